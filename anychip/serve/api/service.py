"""What all requests share: the model, the worker, limits, counters; and who may come in when."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest

from anychip.errors import InputError
from anychip.recipe.schema import SamplingConfig
from anychip.serve.api.errors import ApiError
from anychip.serve.api.grammar import Grammars
from anychip.serve.api.limits import Limits
from anychip.serve.api.metrics import Metrics
from anychip.serve.api.schema import Generation
from anychip.serve.request import Event, Request
from anychip.serve.talker import Talker
from anychip.serve.worker import EngineThread, Worker


@dataclass
class Service:
    """`name` is the model's in answers. `thinking`: every answer begins with reasoning. `thread`: the one in which the
    model was prepared."""

    talker: Talker
    name: str
    limits: Limits = field(default_factory=Limits)
    thinking: bool = False
    thread: EngineThread | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    def __post_init__(self) -> None:
        self.worker = Worker(self.talker.engine, self.thread)
        self.metrics = Metrics(self.worker)
        vocabulary = self.talker.engine.model.config.vocab_size
        self.grammars = Grammars(self.talker.tokenizer, vocabulary, self.limits.grammar_seconds)
        self._answers: Counter[str] = Counter()

    @contextmanager
    def admission(self, http: HttpRequest, answers: int) -> Iterator[None]:
        """Room for `answers` answers, or a refusal that says when to come back."""
        client = http.scope.get("anychip.client", "")
        if self.draining:
            raise ApiError(503, "The server is shutting down.", headers={"Retry-After": "10"})
        taken = sum(self._answers.values())
        full = taken + answers > self.talker.engine.max_batch + self.limits.queue
        if full or self._answers[client] + answers > self.limits.per_key:
            what = "The server is" if full else "This key or address has"
            raise ApiError(
                429,
                f"{what} {'full' if full else 'too many answers at a time'}. Try again later.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self._answers[client] += answers
        try:
            yield
        finally:
            self._answers[client] -= answers
            if not self._answers[client]:
                del self._answers[client]

    def check_model(self, model: str | None) -> None:
        if model is not None and model not in (self.name, "default"):
            raise ApiError(404, "There is no model of that name.", param="model", code="model_not_found")

    async def encode(self, text: str) -> list[int]:
        """Tokens of a text, after a look at its length, in a thread: a megabyte takes a while."""
        self.check_characters(len(text))
        return await asyncio.to_thread(self.talker.tokenizer.encode, text)

    def check_characters(self, characters: int) -> None:
        """Refuse what cannot fit, before any work is done for it."""
        context = self.talker.engine.context_length
        if characters > context * self.limits.characters_per_token:
            raise ApiError(
                400,
                f"The prompt is far longer than the model's context of {context:,} tokens.",
                code="context_length_exceeded",
            )

    def check_prompt(self, prompt: Sequence[int]) -> None:
        context = self.talker.engine.context_length
        if len(prompt) >= context:
            raise ApiError(
                400,
                f"The prompt has {len(prompt):,} tokens; the model's context ends at {context:,}, the answer included.",
                code="context_length_exceeded",
            )
        if not prompt:
            raise ApiError(400, "The prompt is empty.", code="empty_prompt")

    def sampling(self, asked: Generation, most: int | None, prompt_tokens: int) -> SamplingConfig:
        """The model's defaults, with what was asked for; the answer ends with the context at the latest."""
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if (value := getattr(asked, name)) is not None
        }
        room = self.talker.engine.context_length - prompt_tokens
        given["max_new_tokens"] = max(1, min(most or self.talker.sampling.max_new_tokens, room))
        return self.talker.sampling.model_copy(update=given)

    def biases(self, asked: Generation) -> dict[int, float]:
        size = self.talker.engine.model.config.vocab_size
        try:
            biases = {int(token): bias for token, bias in (asked.logit_bias or {}).items()}
        except ValueError:
            raise ApiError(400, "logit_bias: names of tokens are numbers.", param="logit_bias") from None
        if any(not 0 <= token < size for token in biases):
            raise ApiError(400, "logit_bias: a token is outside the vocabulary.", param="logit_bias")
        return biases

    def seed(self, asked: Generation) -> int:
        return secrets.randbits(63) if asked.seed is None else asked.seed

    def requests(
        self, asked: Generation, name: str, prompt: Sequence[int], most: int | None, seed: int, **own: Any
    ) -> list[Request]:
        """The engine's requests for the `n` answers to one prompt, of `most` tokens. `own` holds fields of one
        endpoint."""
        shared = Request(
            id=name,
            prompt=prompt,
            sampling=self.sampling(asked, most, len(prompt)),
            stop_ids=self.talker.stop_ids,
            seed=seed,
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            logit_bias=self.biases(asked),
            **own,
        )
        return [replace(shared, id=f"{name}/{number}", draws=f"choice {number}") for number in range(asked.n or 1)]

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """The worker's events, counted, with errors in the form that clients know."""
        started = time.perf_counter()
        self.metrics.prompt_tokens.inc(len(request.prompt))
        first = True
        try:
            async for event in self.worker.stream(request):
                if event.finish_reason == "error":
                    raise ApiError(500, "The model failed on this request.", code="model_error")
                if event.token is not None:
                    self.metrics.answer_tokens.inc()
                    if first:
                        self.metrics.first_token.observe(time.perf_counter() - started)
                        first = False
                yield event
        except InputError as error:
            raise ApiError(400, error.what) from None
        finally:
            self.metrics.duration.observe(time.perf_counter() - started)


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
