"""Generation: prompts in, tokens out as they come, several requests in one step.

A request's prompt is read in pieces of at most `prefill_tokens`, so that a long prompt does not hold back the answers
that are already running; then every step adds one token to each running request. A request that ends makes room for
the next one at once. What a request answers does not depend on its neighbours beyond the rounding of sums: its draws
are a function of (seed, request id, token index).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from anychip.errors import InputError, UnfitError
from anychip.model.cache import KeyValueCache
from anychip.model.rope import keeps_published_hazard
from anychip.recipe.schema import SamplingConfig
from anychip.serve.inference import InferenceModel, Piece
from anychip.serve.sampling import choose_token, uniform_draw

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `stop_ids` end the answer and are not part of it."""

    id: str
    prompt: Sequence[int]
    sampling: SamplingConfig
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0


@dataclass(frozen=True)
class Event:
    """One token of a request, or its end: `stop` (a stop token), `length` (max_new_tokens) or `context` (no room)."""

    request_id: str
    token: int | None = None
    finish_reason: FinishReason | None = None


@dataclass
class Session:
    """The cache of a conversation and the tokens it holds, so that the next prompt rereads only what is new."""

    cache: KeyValueCache
    tokens: list[int] = field(default_factory=list)

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest common beginning with `prompt`, all but its last token at most; return its length.

        The published rotary rule rereads everything: there a key depends on how long the prompt was.
        """
        common = 0
        limit = 0 if keeps_published_hazard(self.cache.config) else min(len(self.tokens), len(prompt) - 1)
        while common < limit and self.tokens[common] == prompt[common]:
            common += 1
        self.cache.truncate(common)
        del self.tokens[common:]
        return common


@dataclass
class _Running:
    request: Request
    session: Session
    pending: list[int]
    """Tokens the model has not read: the rest of the prompt, or the last token of the answer."""
    seen: list[int]
    """Prompt and answer."""
    answered: int = 0


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
        running = self._start(request, session)
        while True:
            event = self._step([running])[0]
            if event is not None:
                yield event
                if event.finish_reason is not None:
                    return

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Events of many requests with different ids, up to `max_batch` of them at a time.

        The events of one request come in their order; those of different requests are interleaved.
        """
        waiting = deque(requests)
        for request in waiting:
            self.check(request)
        running: list[_Running] = []
        while waiting or running:
            while waiting and len(running) < self.max_batch:
                running.append(self._start(waiting.popleft(), None))
            events = self._step(running)
            yield from (event for event in events if event is not None)
            ended = [event is not None and event.finish_reason is not None for event in events]
            running = [one for one, end in zip(running, ended, strict=True) if not end]

    def _start(self, request: Request, session: Session | None) -> _Running:
        session = session or self.new_session()
        kept = session.reuse(request.prompt)
        needed = len(request.prompt) + request.sampling.max_new_tokens
        session.cache.grow(min(needed, self.context_length))
        return _Running(request, session, list(request.prompt[kept:]), list(request.prompt))

    def _step(self, running: list[_Running]) -> list[Event | None]:
        """One forward pass; the event of each running request, None where its prompt is still being read."""
        taken = [one.pending[: self.prefill_tokens] for one in running]
        pieces = [
            Piece(one.session.cache, len(tokens), len(one.seen)) for one, tokens in zip(running, taken, strict=True)
        ]
        ids = torch.tensor([token for tokens in taken for token in tokens], device=self.model.device)
        logits = self.model.forward(ids, pieces)
        for one, tokens in zip(running, taken, strict=True):
            one.session.tokens += tokens
            one.pending = one.pending[len(tokens) :]
        return [None if one.pending else self._next(one, row) for one, row in zip(running, logits, strict=True)]

    def _next(self, one: _Running, logits: Tensor) -> Event:
        """Choose a token after the prompt or after the last token, and say whether the answer goes on.

        The last event of an answer may carry its last token: with `length` and `context` it does.
        """
        request = one.request
        if not bool(logits.isfinite().all()):
            raise UnfitError("the model's logits are not finite numbers: its weights are damaged.", where=request.id)
        draw = uniform_draw(request.seed, request.id, one.answered)
        token = choose_token(logits, one.seen, request.sampling, draw)
        if token in request.stop_ids:
            return Event(request.id, None, "stop")
        one.seen.append(token)
        one.answered += 1
        one.pending = [token]
        if one.answered == request.sampling.max_new_tokens:
            return Event(request.id, token, "length")
        if len(one.seen) == self.context_length:
            return Event(request.id, token, "context")
        return Event(request.id, token)
