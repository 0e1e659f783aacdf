"""One thread that does what it is given, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from anychip import alive

Result = TypeVar("Result")


class Worker:
    """Like a ThreadPoolExecutor of one thread, which takes no more work once the interpreter began to leave.

    A background save may still be running then and must be able to finish. What it does is part of the task of the
    thread that made it.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(alive.task_here(),), name=name)
        self._thread.start()

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        future: Future[Result] = Future()

        def task() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._tasks.put(None)
        self._thread.join()

    def _work(self, part_of: alive.Task) -> None:
        alive.work_at(part_of)
        while task := self._tasks.get():
            task()
            alive.progressed()
