"""Answers as they come: text of one, several merged, a stream of server-sent events, an end when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anychip.serve.api.errors import ApiError
from anychip.serve.api.service import Service
from anychip.serve.api.text import StopStrings, TagDecoder
from anychip.serve.request import Request, TokenLogprob

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Text that is certain, the log-probabilities of the tokens that begin in it, and at the end why it ended."""

    text: str
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None
    tokens: int = 0
    """Tokens answered so far."""
    prompt_logprobs: Sequence[TokenLogprob] | None = None


async def text_of(service: Service, request: Request, stops: Sequence[str]) -> AsyncIterator[Chunk]:
    """The text of one answer. A stop string ends it and is not part of it."""
    decoder, stop = TagDecoder(service.talker.tokenizer), StopStrings(stops)
    decoded = released = tokens = 0
    waiting: list[tuple[int, TokenLogprob]] = []  # where each token's text begins

    def release(text: str, everything: bool = False) -> list[TokenLogprob]:
        nonlocal released
        released += len(text)
        ready = [one for start, one in waiting if everything or start < released]
        del waiting[: len(ready)]
        return ready

    async with aclosing(service.events(request)) as events:  # type: ignore[type-var]
        async for event in events:
            text = ""
            if event.token is not None:
                tokens += 1
                if event.logprob is not None:
                    waiting.append((decoded, event.logprob))
                text = decoder.feed(event.token)
            if event.finish_reason is not None:
                text += decoder.finish()
            decoded += len(text)
            out = stop.feed(text)
            if stop.found:
                yield Chunk(out, release(out), "stop", tokens, event.prompt_logprobs)
                return
            if event.finish_reason is not None:
                out += stop.finish()
                reason = "stop" if event.finish_reason == "stop" else "length"
                yield Chunk(out, release(out, everything=True), reason, tokens, event.prompt_logprobs)
                return
            if out or event.prompt_logprobs is not None:
                yield Chunk(out, release(out), None, tokens, event.prompt_logprobs)


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """(number of the stream, item) of several streams as they come. Closing it closes them all."""
    items: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncIterator[T]) -> None:
        try:
            async with aclosing(stream) as opened:  # type: ignore[type-var]
                async for item in opened:
                    items.put_nowait((number, item))
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(http.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "The client has gone.")
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, one JSON object each, then [DONE]. `release` is called when it is over, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, records: AsyncIterator[dict[str, Any]], release: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._records, self._release = records, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (sending, watch):
                one.cancel()
            await asyncio.gather(sending, watch, return_exceptions=True)
            self._release()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._records) as records:  # type: ignore[type-var]
            try:
                async for record in records:
                    await send(_event(json.dumps(record, ensure_ascii=False)))
            except ApiError as error:
                await send(_event(json.dumps(error.body)))
        await send(_event("[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
