"""A loaded model as evaluations ask it (a `LanguageModel`): by the engine in this process, many texts at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from anychip.evals.language_model import Likelihood, cut, move_spaces
from anychip.recipe.schema import SamplingConfig
from anychip.serve.request import Request, TokenLogprob
from anychip.serve.talker import Talker


class _Until:
    """A constraint that forbids nothing and ends an answer once its text holds a stop."""

    def __init__(self, talker: Talker, stops: Sequence[str]) -> None:
        self._decoder, self._stops, self._text = talker.tokenizer.stream_decoder(), stops, ""

    def mask(self, logits: Tensor) -> Tensor:
        return logits

    def accept(self, token: int) -> bool:
        self._text += self._decoder.feed(token)
        return cut(self._text, self._stops) == self._text


class EngineModel:
    """With `chat`, contexts are questions in the model's own template and continuations its answers."""

    def __init__(self, talker: Talker, name: str, *, chat: bool = False) -> None:
        self._talker, self.name, self._chat = talker, name, chat

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        longest = self._talker.engine.context_length - 1
        requests, counts = [], []
        for number, (context, continuation) in enumerate(pairs):
            before, after = self._encode(context, continuation)
            requests.append(self._request(number, [*before, *after][-longest:], 1, likelihood=True))
            counts.append(min(len(after), longest - 1))
        found: dict[str, Sequence[TokenLogprob]] = {
            event.request_id: event.prompt_logprobs or ()
            for event in self._talker.engine.run(requests)
            if event.prompt_logprobs is not None
        }
        return [_likelihood(found[request.id], count) for request, count in zip(requests, counts, strict=True)]

    def generate(self, prompts: Sequence[str], stops: Sequence[str], max_new_tokens: int) -> list[str]:
        room = self._talker.engine.context_length - max_new_tokens
        requests = [
            self._request(number, self._prompt(prompt)[-max(1, room) :], max_new_tokens, stops)
            for number, prompt in enumerate(prompts)
        ]
        tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        for event in self._talker.engine.run(requests):
            if event.token is not None:
                tokens[event.request_id].append(event.token)
        return [cut(self._talker.tokenizer.decode(tokens[request.id]), stops) for request in requests]

    def _request(
        self, number: int, prompt: list[int], longest: int, stops: Sequence[str] = (), *, likelihood: bool = False
    ) -> Request:
        return Request(
            str(number),
            prompt,
            SamplingConfig(temperature=0.0, max_new_tokens=longest),
            self._talker.stop_ids,
            constraint=_Until(self._talker, stops) if stops else None,
            top_logprobs=1 if likelihood else None,
            prompt_logprobs=likelihood,
        )

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, and those that a continuation adds to it. An empty context is the end of a document."""
        tokenizer = self._talker.tokenizer
        if self._chat:
            return self._prompt(context), tokenizer.encode(continuation.lstrip())
        context, continuation = move_spaces(context, continuation)
        if not context:
            return [tokenizer.eos_id], tokenizer.encode(continuation)
        before, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
        return both[: len(before)], both[len(before) :]

    def _prompt(self, context: str) -> list[int]:
        if self._chat:
            return self._talker.encode_messages([{"role": "user", "content": context}])
        return self._talker.tokenizer.encode(context) or [self._talker.tokenizer.eos_id]


def _likelihood(logprobs: Sequence[TokenLogprob], count: int) -> Likelihood:
    """Of the last `count` tokens of a prompt."""
    last = logprobs[len(logprobs) - count :]
    return Likelihood(sum(one.logprob for one in last), all(one.top[0][0] == one.token for one in last))
