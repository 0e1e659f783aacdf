"""Generation: prompts in, tokens out as they come, several requests in one step.

What a request answers does not depend on its neighbours beyond the rounding of sums: its draws are a function of
(seed, request, token index). In the batch-invariant mode of the model it does not depend on them at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from anychip.errors import InputError, UnfitError
from anychip.model.cache import KeyValueCache
from anychip.model.rope import keeps_published_hazard
from anychip.serve.answer import Answer, choose_next
from anychip.serve.batch import Batch
from anychip.serve.inference import InferenceModel
from anychip.serve.request import Event, Request
from anychip.serve.slots import common_beginning

__all__ = ["Engine", "Event", "Request", "Session"]


@dataclass
class Session:
    """The cache of a conversation and the tokens it holds, so that the next prompt rereads only what is new."""

    cache: KeyValueCache
    tokens: list[int] = field(default_factory=list)

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest common beginning with `prompt`, all but its last token at most; return its length.

        The published rotary rule rereads everything: there a key depends on how long the prompt was.
        """
        limit = 0 if keeps_published_hazard(self.cache.config) else len(prompt) - 1
        common = common_beginning(self.tokens, prompt, limit)
        self.cache.truncate(common)
        del self.tokens[common:]
        return common


class Engine:
    """Generates with one InferenceModel. Not for use from several threads."""

    def __init__(
        self,
        model: InferenceModel,
        *,
        context_length: int | None = None,
        max_batch: int = 8,
        prefill_tokens: int = 512,
    ) -> None:
        """`context_length` defaults to the model's max_position_embeddings, beyond which it was not made to go."""
        self.model = model
        self.context_length = context_length or model.config.max_position_embeddings
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens

    def new_session(self) -> Session:
        """An empty conversation. Its cache grows with it, up to the context."""
        return Session(self.model.new_cache(0))

    def new_batch(self) -> Batch:
        """Room for `max_batch` requests at a time, and the caches of those that have ended."""
        return Batch(self.model, self.context_length, self.max_batch, self.prefill_tokens)

    def check(self, request: Request) -> None:
        """Raise InputError for a prompt that is empty, too long, or foreign to the model's vocabulary."""
        if not request.prompt:
            raise InputError("the prompt holds no tokens.", where=request.id, do="Give it some text.")
        if len(request.prompt) >= self.context_length:
            raise InputError(
                f"the prompt has {len(request.prompt):,} tokens and the model's context ends at "
                f"{self.context_length:,}, the answer included.",
                where=request.id,
                do="Shorten the prompt.",
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.model.config.vocab_size:
            raise InputError(
                f"the prompt holds token ids outside the model's vocabulary of {self.model.config.vocab_size:,}.",
                where=request.id,
                do="Use the tokenizer that the model was trained with.",
            )

    def stream(self, request: Request, session: Session | None = None) -> Iterator[Event]:
        """Tokens of one answer as they come, then one event with a finish_reason."""
        self.check(request)
        session = session or self.new_session()
        kept = session.reuse(request.prompt)
        needed = len(request.prompt) + request.sampling.max_new_tokens
        session.cache.grow(min(needed, self.context_length))
        prompt = list(request.prompt)
        answer = Answer(request, session.cache, session.tokens, self.context_length, prompt[kept:], prompt)
        while True:
            count = min(len(answer.pending), self.prefill_tokens)
            ids = torch.tensor(answer.pending[:count], device=self.model.device)
            logits = self.model.forward(ids, [answer.piece(count)])
            if answer.advance(count, logits):
                (event,) = choose_next([answer], logits[-1:])
                yield _sound(event)
                if event.finish_reason is not None:
                    return

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Events of many requests with different ids, up to `max_batch` of them at a time.

        The events of one request come in their order; those of different requests are interleaved.
        """
        batch = self.new_batch()
        for request in requests:
            self.check(request)
            batch.add(request)
        while len(batch):
            yield from map(_sound, batch.step())


def _sound(event: Event) -> Event:
    if event.finish_reason == "error":
        raise UnfitError("the model's logits are not finite numbers: its weights are damaged.", where=event.request_id)
    return event
