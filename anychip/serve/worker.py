"""The engine in a thread of its own: requests of an event loop go in, tokens come out, a cancelled task cancels."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TypeVar

from anychip.serve.batch import Batch
from anychip.serve.engine import Engine
from anychip.serve.request import Event, Request

_Command = Callable[[Batch], None]
T = TypeVar("T")


class EngineThread:
    """The one thread that computes. A model that is prepared here too is answered with at full speed: OpenMP gives each
    thread that ever multiplied helpers of its own, and with more helpers than cores none waits awake for its work."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def begin(self, function: Callable[[], T]) -> Future[T]:
        """Call it in the thread, after what was begun before."""
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def _work(self) -> None:
        while True:
            self._tasks.get()()


class Worker:
    """One thread that steps one engine. Everything else happens in the event loop that called `start`."""

    def __init__(self, engine: Engine, thread: EngineThread | None = None) -> None:
        self.engine = engine
        self._thread = thread or EngineThread()
        self._working: Future[None] | None = None
        self.batch = self._thread.begin(engine.new_batch).result()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._answers: dict[str, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def load(self) -> int:
        """Requests that are running or waiting."""
        return len(self._answers)

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._working = self._thread.begin(self._work)

    async def stop(self) -> None:
        """End the work after the step it is in."""
        self._commands.put(None)
        if self._working is not None:
            await asyncio.wrap_future(self._working)

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """The events of one request. Whoever stops reading (break, cancelled task) ends the request.

        Raises InputError at once for an impossible prompt.
        """
        self.engine.check(request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._answers[request.id] = events
        self._commands.put(lambda batch: batch.add(request))
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = event.finish_reason is not None
                yield event
        finally:
            del self._answers[request.id]
            if not ended:
                self._commands.put(lambda batch: batch.cancel(request.id))

    def _work(self) -> None:
        while self._take_commands():
            try:
                events = self.batch.step()
            except Exception:  # one broken step must not end the service
                traceback.print_exc(file=sys.stderr)
                lost = [*self.batch.running, *(request.id for request in self.batch.waiting)]
                events = [Event(name, None, "error") for name in lost]
                self.batch = self.engine.new_batch()
            if events and self._loop is not None:
                try:
                    self._loop.call_soon_threadsafe(self._deliver, events)
                except RuntimeError:  # the loop has ended
                    return

    def _take_commands(self) -> bool:
        """Do what was asked, waiting for it when there is nothing else to do; False: end."""
        wait = not len(self.batch)
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(self.batch)
            wait = False

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if (answer := self._answers.get(event.request_id)) is not None:
                answer.put_nowait(event)
