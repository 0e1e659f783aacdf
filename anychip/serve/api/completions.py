"""POST /v1/completions: plain continuation, with the log-probabilities that evaluations ask for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anychip.data.tokenizer import Tokenizer
from anychip.serve.api.answers import EventStream, merged, text_of, unless_gone
from anychip.serve.api.chat import usage
from anychip.serve.api.errors import ApiError
from anychip.serve.api.schema import CompletionRequest
from anychip.serve.api.service import Service, new_id
from anychip.serve.request import Request, TokenLogprob


async def complete(service: Service, asked: CompletionRequest, http: HttpRequest) -> Response:
    """Continue one prompt or several, `n` times each, at once or as a stream."""
    service.check_model(asked.model)
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError(400, "max_tokens 0 needs echo: true.", param="max_tokens")
    prompts = _prompts(asked)
    with ExitStack() as stack:
        stack.enter_context(service.admission(http, len(prompts) * (asked.n or 1)))
        requests = await unless_gone(http, _prepare(service, asked, prompts))
        answer = _Answer(service, asked, requests)
        if asked.stream:
            return EventStream(answer.stream(), stack.pop_all().close)
        return JSONResponse(await unless_gone(http, answer.whole()))
    raise AssertionError  # the context lets every exception through


def _prompts(asked: CompletionRequest) -> list[str | list[int]]:
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]


async def _prepare(service: Service, asked: CompletionRequest, prompts: list[str | list[int]]) -> list[Request]:
    service.check_characters(sum(len(prompt) for prompt in prompts))
    control = frozenset(service.talker.tokenizer.special_tokens.values())
    seed, name = service.seed(asked), new_id("text")
    requests: list[Request] = []
    for place, given in enumerate(prompts):
        if isinstance(given, list) and not control.isdisjoint(given):
            raise ApiError(400, "prompt: control tokens cannot be given as numbers.", param="prompt")
        prompt = await service.encode(given) if isinstance(given, str) else given
        service.check_prompt(prompt)
        if max(prompt) >= service.talker.engine.model.config.vocab_size:
            raise ApiError(400, "prompt: a token is outside the vocabulary.", param="prompt")
        requests += service.requests(
            asked,
            f"{name}/{place}",
            prompt,
            asked.max_tokens or (1 if asked.max_tokens == 0 else None),
            seed,
            top_logprobs=asked.logprobs,
            prompt_logprobs=bool(asked.echo) and asked.logprobs is not None,
        )
    return requests


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str | None = None


class _Answer:
    def __init__(self, service: Service, asked: CompletionRequest, requests: Sequence[Request]) -> None:
        self._service, self._asked, self._requests = service, asked, requests
        self._tokenizer: Tokenizer = service.talker.tokenizer
        self._id = new_id("cmpl")
        self._choices = [_Choice() for _ in requests]

    async def _pieces(self) -> AsyncIterator[tuple[int, str, list[TokenLogprob | None], str | None]]:
        """(choice, new text, new log-probabilities, why it ended) as they come; with `echo` the prompt comes first."""
        only_prompt = self._asked.max_tokens == 0
        echoed: set[int] = set()
        streams = [text_of(self._service, request, self._asked.stops) for request in self._requests]
        async for number, chunk in merged(streams):
            choice = self._choices[number]
            text, logprobs = ("", []) if only_prompt else (chunk.text, [*chunk.logprobs])
            found: list[TokenLogprob | None] = list(logprobs)
            if self._asked.echo and number not in echoed:
                echoed.add(number)
                text = self._tokenizer.decode(self._requests[number].prompt) + text
                if chunk.prompt_logprobs is not None:
                    found = [None, *chunk.prompt_logprobs, *found]
            choice.text.append(text)
            choice.logprobs += found
            choice.tokens = 0 if only_prompt else chunk.tokens
            choice.finish_reason = "length" if only_prompt and chunk.finish_reason else chunk.finish_reason
            yield number, text, found, choice.finish_reason

    async def whole(self) -> dict[str, Any]:
        async for _ in self._pieces():
            pass
        choices = [
            self._choice(number, "".join(choice.text), choice.logprobs, choice.finish_reason, 0)
            for number, choice in enumerate(self._choices)
        ]
        return {**self._head(), "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        offsets = [0] * len(self._requests)
        async for number, text, logprobs, reason in self._pieces():
            yield {**self._head(), "choices": [self._choice(number, text, logprobs, reason, offsets[number])]}
            offsets[number] += len(text)
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield {**self._head(), "choices": [], "usage": self._usage()}

    def _choice(
        self, number: int, text: str, logprobs: Sequence[TokenLogprob | None], reason: str | None, offset: int
    ) -> dict[str, Any]:
        shown = None if self._asked.logprobs is None else self._logprobs(number, logprobs, offset)
        return {"index": number, "text": text, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, number: int, logprobs: Sequence[TokenLogprob | None], offset: int) -> dict[str, Any]:
        first = self._requests[number].prompt[0]
        tokens, offsets = [], []
        for one in logprobs:
            tokens.append(self._piece(first if one is None else one.token))
            offsets.append(offset)
            offset += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [None if one is None else max(one.logprob, -9999.0) for one in logprobs],
            "top_logprobs": [
                None if one is None else {self._piece(token): max(value, -9999.0) for token, value in one.top}
                for one in logprobs
            ],
            "text_offset": offsets,
        }

    def _piece(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._service.created,
            "model": self._service.name,
        }

    def _usage(self) -> dict[str, int]:
        prompts = {request.id.rpartition("/")[0]: len(request.prompt) for request in self._requests}
        return usage(sum(prompts.values()), sum(choice.tokens for choice in self._choices))
