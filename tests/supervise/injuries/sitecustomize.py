"""Found on PYTHONPATH by processes that a test trains with: they do what a file INJURIES/rank-N asks for, until it is
gone.

`loop` computes for ever in the interpreter, `lock` waits in C for a byte from the pipe INJURIES/gate and never gives
the interpreter up, `read` waits for a token of the corpus, `sleep` makes each step longer by 0.6 s, `memory` takes more
than it may have, `wrong` computes gradients that are a thousandth too large. `die at SPOT` is an end by signal 9,
once, where a phase of a step begins or at one of the SPOTS of a start, of a save, or of a copy in memory
(anychip/supervise/chaos/spots.py). `wait at SPOT`
waits there as long as there is a file INJURIES/waiting, which it makes of the wish.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any


def _wish(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _hold_the_interpreter(path: Path) -> None:
    gate = os.open(path.with_name("gate"), os.O_RDWR)
    ctypes.PyDLL(None).read(gate, ctypes.create_string_buffer(1), 1)  # keeps the lock through the call
    os.close(gate)


def _loop(path: Path) -> None:
    while _wish(path) == "loop":
        pass


def _take_memory() -> list[bytes]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    return [bytes(16 << 20) for _ in range(1 << 10)]


def _die_at(path: Path, spot: str) -> None:
    if _wish(path) == f"die at {spot}":
        path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if _wish(path) == f"wait at {spot}":
        path.rename(waiting := path.with_name("waiting"))
        while waiting.exists():
            time.sleep(0.01)


def _make_mortal(path: Path) -> None:
    """Ends at the beginning of phases, and inside starts and saves."""
    from anychip.supervise.chaos.spots import SPOTS, before, surround
    from anychip.train.heartbeat import Heartbeat

    for name, spot in SPOTS.items():
        surround(spot, before(partial(_die_at, path, name)))

    beat = Heartbeat.beat

    def mortal_beat(self: Any, phase: str) -> None:
        beat(self, phase)
        _die_at(path, phase)

    Heartbeat.beat = mortal_beat  # type: ignore[method-assign]


def _injure(path: Path) -> None:
    from anychip.data.indexed import IndexedCorpus
    from anychip.train.engine import Engine

    loss, tokens = Engine._loss, IndexedCorpus.tokens

    def injured_loss(self: Any, *inputs: Any) -> Any:
        wish = _wish(path)
        if wish == "lock":
            _hold_the_interpreter(path)
        elif wish == "loop":
            _loop(path)
        elif wish == "sleep":
            time.sleep(0.6)
        elif wish == "memory":
            _take_memory()
        return loss(self, *inputs) * (1.001 if wish == "wrong" else 1.0)

    def injured_tokens(self: Any, *inputs: Any) -> Any:
        while _wish(path) == "read":
            time.sleep(0.02)
        return tokens(self, *inputs)

    _make_mortal(path)
    Engine._loss, IndexedCorpus.tokens = injured_loss, injured_tokens  # type: ignore[method-assign]


if "INJURIES" in os.environ and "RANK" in os.environ:
    _injure(Path(os.environ["INJURIES"]) / f"rank-{os.environ['RANK']}")
