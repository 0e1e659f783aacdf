"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from anychip.data.tokenizer import Tokenizer
from anychip.serve.api.answers import Chunk, EventStream, merged, text_of, unless_gone
from anychip.serve.api.conversation import encode_conversation
from anychip.serve.api.errors import ApiError
from anychip.serve.api.grammar import GrammarConstraint
from anychip.serve.api.schema import ChatRequest, NamedTool
from anychip.serve.api.service import Service, new_id
from anychip.serve.api.text import Call, Piece, Splitter
from anychip.serve.request import Request, TokenLogprob

Tools = Mapping[str, Mapping[str, Any]]


async def chat(service: Service, asked: ChatRequest, http: HttpRequest) -> Response:
    """Answer a conversation, at once or as a stream."""
    service.check_model(asked.model)
    count = asked.n or 1
    with ExitStack() as stack:
        stack.enter_context(service.admission(http, count))
        requests = await unless_gone(http, _prepare(service, asked, count))
        answer = _Answer(service, asked, requests, _offered(asked))
        if asked.stream:
            return EventStream(answer.stream(), stack.pop_all().close)
        return JSONResponse(await unless_gone(http, answer.whole()))
    raise AssertionError  # the context lets every exception through


async def _prepare(service: Service, asked: ChatRequest, count: int) -> list[Request]:
    """The engine's requests, one an answer."""
    service.check_characters(sum(len(message.text) for message in asked.messages))
    constraints = await _constraints(service, asked, count)
    shown = [] if asked.tool_choice == "none" else asked.tools or []
    prompt = await asyncio.to_thread(
        encode_conversation,
        asked.messages,
        shown,
        service.talker.tokenizer,
        service.talker.template,
        thinking=service.thinking and constraints is None,
    )
    service.check_prompt(prompt)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    most = asked.max_completion_tokens or asked.max_tokens
    shown_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    requests = service.requests(asked, new_id("chat"), prompt, most, service.seed(asked), top_logprobs=shown_logprobs)
    if constraints is None:
        return requests
    return [replace(request, constraint=own) for request, own in zip(requests, constraints, strict=True)]


async def _constraints(service: Service, asked: ChatRequest, count: int) -> list[GrammarConstraint] | None:
    tools, wanted = _offered(asked), asked.tool_choice
    if isinstance(wanted, NamedTool) or wanted == "required":
        names = [wanted.function.name] if isinstance(wanted, NamedTool) else list(tools or {})
        if not names or not set(names) <= set(tools or {}):
            raise ApiError(400, "tool_choice names no function of tools.", param="tool_choice")
        several = wanted == "required" and asked.parallel_tool_calls is not False
        chosen = {name: (tools or {})[name] for name in names}
        return await service.grammars.calls(chosen, count, parallel=several)
    form = asked.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and (form.json_schema is None or form.json_schema.schema_ is None):
        raise ApiError(400, "response_format: json_schema needs a schema.", param="response_format")
    schema = form.json_schema.schema_ if form.type == "json_schema" and form.json_schema else None
    return await service.grammars.json(schema, count)


def _offered(asked: ChatRequest) -> Tools | None:
    """Schemas of the functions that may be called."""
    if not asked.tools or asked.tool_choice == "none":
        return None
    return {tool.function.name: tool.function.parameters or {} for tool in asked.tools}


@dataclass
class _Choice:
    """What one answer has been so far."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0

    def take(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Call):
                self.calls.append(piece)
            else:
                (self.reasoning if piece[0] == "reasoning" else self.content).append(piece[1])


class _Answer:
    """The answers to one request."""

    def __init__(self, service: Service, asked: ChatRequest, requests: Sequence[Request], tools: Tools | None) -> None:
        self._service, self._asked, self._requests, self._tools = service, asked, requests, tools
        self._id = new_id("chatcmpl")
        self._choices = [_Choice() for _ in requests]

    async def _pieces(self) -> AsyncIterator[tuple[int, list[Piece], list[dict[str, Any]], str | None]]:
        """(choice, new pieces, new log-probabilities, why it ended) as they come."""
        stops = self._asked.stops
        thinking = self._service.thinking and self._requests[0].constraint is None
        splitters = [Splitter(self._tools, thinking=thinking) for _ in self._requests]
        streams: list[AsyncIterator[Chunk]] = [text_of(self._service, request, stops) for request in self._requests]
        async for number, chunk in merged(streams):
            choice, splitter = self._choices[number], splitters[number]
            pieces = splitter.feed(chunk.text)
            if chunk.finish_reason is not None:
                pieces += splitter.finish()
            logprobs = [_logprob(one, self._service.talker.tokenizer) for one in chunk.logprobs]
            choice.take(pieces)
            choice.logprobs += logprobs
            choice.tokens = chunk.tokens
            reason = chunk.finish_reason
            choice.finish_reason = "tool_calls" if reason == "stop" and choice.calls else reason
            yield number, pieces, logprobs, choice.finish_reason

    async def whole(self) -> dict[str, Any]:
        async for _ in self._pieces():
            pass
        choices = [self._choice(number, choice) for number, choice in enumerate(self._choices)]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def _choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.content), "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["tool_calls"] = [_call(call) for call in choice.calls]
            message["content"] = message["content"] or None
        logprobs = {"content": choice.logprobs, "refusal": None} if self._asked.logprobs else None
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        for number in range(len(self._requests)):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        async for number, pieces, logprobs, reason in self._pieces():
            calls = len(self._choices[number].calls) - sum(isinstance(piece, Call) for piece in pieces)
            for piece in pieces or ([("content", "")] if logprobs else []):
                if isinstance(piece, Call):
                    delta: dict[str, Any] = {"tool_calls": [{"index": calls, **_call(piece)}]}
                    calls += 1
                else:
                    delta = {"content" if piece[0] == "content" else "reasoning_content": piece[1]}
                yield self._chunk(number, delta, logprobs)
                logprobs = []
            if reason is not None:
                yield self._chunk(number, {}, finish_reason=reason)
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        logprobs: Sequence[dict[str, Any]] = (),
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        shown = {"content": list(logprobs), "refusal": None} if self._asked.logprobs and logprobs else None
        choice = {"index": number, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._service.created, "model": self._service.name}

    def _usage(self) -> dict[str, int]:
        return usage(len(self._requests[0].prompt), sum(choice.tokens for choice in self._choices))


def usage(prompt: int, answers: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprob(one: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    top = [_entry(token, value, tokenizer) for token, value in one.top]
    return {**_entry(one.token, one.logprob, tokenizer), "top_logprobs": top}


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode([token], skip_special=False)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
