"""What a process that trains does in a rehearsal: it tells the history what it makes, restores and saves, and hurts
itself as FOLDER/wish-RANK asks, once.

Nothing of this is there unless ANYCHIP_CHAOS names the folder (`anychip chaos` does).

    die at SPOT             an end by signal 9, where the function of a spot is called (spots.py)
    fail at SPOT ERROR      that function meets an error of the disk, such as EIO
    flip KIND NUMBER        before a step, a bit of a weight or of the optimizer's state turns over
    nan                     a micro-batch's loss, and so its gradients, are no numbers
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anychip.supervise.chaos.history import FOLDER_VARIABLE, Teller
from anychip.supervise.chaos.spots import SPOTS, before, surround

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.train.checkpoint.manifest import Chunk, Manifest
    from anychip.train.memory.parts import PartRecord

_STORY = "attest"  # how a checkpoint came to be, not what it is


def wish_path(folder: Path, rank: int) -> Path:
    return folder / f"wish-{rank}"


def take_part() -> None:
    """Called once, by a process that is about to train, if FOLDER_VARIABLE is set."""
    folder, rank = Path(os.environ[FOLDER_VARIABLE]), int(os.environ.get("RANK", "0"))
    generation = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    teller = Teller(folder, generation=generation, rank=rank, pid=os.getpid())
    teller.tell("began")
    wishes = Wishes(wish_path(folder, rank), teller)
    _tell_of_saves(teller)
    steps = _Steps(teller, wishes)
    steps.install()
    for name, spot in SPOTS.items():
        surround(spot, before(partial(wishes.strike_at, name)))


class Wishes:
    """What this process was asked to suffer."""

    def __init__(self, path: Path, teller: Teller) -> None:
        self._path, self._teller = path, teller

    def take(self, kind: str) -> list[str] | None:
        """The words of a wish that begins with these, which is then granted; None for any other, or none."""
        try:
            words = self._path.read_text(encoding="utf-8")
        except OSError:
            return None
        if not f"{words} ".startswith(f"{kind} "):
            return None
        try:
            self._path.unlink()
        except FileNotFoundError:  # another thread was first
            return None
        self._teller.tell("hurt", wish=words)
        return words.split()

    def strike_at(self, spot: str) -> None:
        if self.take(f"die at {spot}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if words := self.take(f"fail at {spot}"):
            number = getattr(errno, words[-1])
            raise OSError(number, os.strerror(number))


class _Steps:
    """Stands around every step."""

    def __init__(self, teller: Teller, wishes: Wishes) -> None:
        self._teller, self._wishes = teller, wishes
        self._step = self._made = 0

    def install(self) -> None:
        surround(("anychip.train.engine", "Engine", "begin_step"), self._around_begin)
        surround(("anychip.train.loop", "", "train_step"), self._around_step)
        surround(("anychip.train.engine", "Engine", "_loss"), self._around_loss)
        surround(("anychip.train.saves", "Saves", "restore"), self._around_restore)

    def _around_begin(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def begin(engine: Any, step: int) -> None:
            self._step = step
            function(engine, step)

        return begin

    def _around_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def make(engine: Any, optimizer: Any, processes: Any, batch: Any, *rest: Any) -> Any:
            # A state is watched from its first comparison on, which follows a step.
            if self._made and (words := self._wishes.take("flip")):
                state = engine.trainable if words[1] == "weight" else optimizer.state()
                flip(state, int(words[2]))
            done = function(engine, optimizer, processes, batch, *rest)
            self._made += 1
            read = hashlib.sha256(batch.input_ids.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest()
            self._teller.tell("step", step=self._step, batch=read[:16], loss=done.loss, applied=not done.problem)
            return done

        return make

    def _around_loss(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def loss(*inputs: Any) -> Any:
            return function(*inputs) * (float("nan") if self._wishes.take("nan") else 1.0)

        return loss

    def _around_restore(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def restore(saves: Any) -> Any:
            self._made = 0
            found = function(saves)
            if found[0] == 0:
                self._teller.tell("restored", step=0, source="nothing", boxes="", extra="")
            return found

        return restore


def flip(state: Mapping[str, Tensor], number: int) -> None:
    """Turn over the bit of this number, counted through all tensors, round and round."""
    import torch

    from anychip.parallel.tensor import local

    held = [local(tensor.detach()) for tensor in state.values() if tensor.dim()]
    tensors = [tensor.view(-1).view(torch.uint8) for tensor in held if tensor.numel() and tensor.is_contiguous()]
    number %= sum(8 * tensor.numel() for tensor in tensors)
    for tensor in tensors:
        if number < 8 * tensor.numel():
            tensor[number // 8] ^= 1 << number % 8
            return
        number -= 8 * tensor.numel()


def _tell_of_saves(teller: Teller) -> None:
    def around_load(function: Callable[..., Any]) -> Callable[..., Any]:
        def load(store: Any, info: Any, *rest: Any, **named: Any) -> None:
            function(store, info, *rest, **named)
            source = "disk" if info.path.parent == store._root else "memory"
            teller.tell("restored", step=info.step, source=source, **_of_manifest(info.manifest))

        return load

    def around_publish(function: Callable[..., Any]) -> Callable[..., Any]:
        def publish(directory: Path, manifest: Manifest) -> Any:
            teller.tell("claims", step=manifest.step, **_of_manifest(manifest))
            final = function(directory, manifest)
            teller.tell("commits", step=manifest.step, **_of_manifest(manifest))
            return final

        return publish

    def around_part(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(directory: Path, step: int, *rest: Any) -> Any:
            record = function(directory, step, *rest)
            facts = _of_part(record)
            teller.tell("part", step=step, attempt=record.attempt, world_size=record.world_size, **facts)
            return record

        return write

    def around_copy(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(copies: Any, step: int, attempt: str, *rest: Any) -> None:
            function(copies, step, attempt, *rest)
            teller.tell("copied", step=step, attempt=attempt)

        return write

    surround(("anychip.train.checkpoint.store", "CheckpointStore", "load"), around_load)
    surround(("anychip.train.checkpoint.save", "", "publish"), around_publish)
    surround(("anychip.train.memory.copies", "", "write_part"), around_part)
    surround(("anychip.train.memory.copies", "MemoryCopies", "_write"), around_copy)


def _of_manifest(manifest: Manifest) -> dict[str, str]:
    boxes = ((name, e.dtype, e.shape, chunk) for name, e in manifest.tensors.items() for chunk in e.chunks)
    return {"boxes": _sum(boxes), "extra": _digest(state_of(manifest.extra))}


def _of_part(record: PartRecord) -> dict[str, str]:
    boxes = ((box.name, box.dtype, box.shape, box.chunk) for box in record.boxes)
    return {"boxes": _sum(boxes), "extra": _digest(state_of(record.extra))}


def state_of(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a run goes on from besides tensors: where the data stands, the guard's memory."""
    return {key: value for key, value in extra.items() if key != _STORY}


def _sum(boxes: Iterable[tuple[str, str, list[int], Chunk]]) -> str:
    """The sum of the digests of boxes, whichever file they lie in: that of a state is that of its parts."""
    digests = (_digest([name, dtype, shape, c.offsets, c.sizes, c.sha256]) for name, dtype, shape, c in boxes)
    return f"{sum(int(digest, 16) for digest in digests) % (1 << 256):064x}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
