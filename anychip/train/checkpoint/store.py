"""The checkpoints of one run: save, save in the background, find the newest good one, load, stream."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anychip import alive
from anychip.errors import AnychipError, InputError, UnfitError
from anychip.progress import progress
from anychip.train.checkpoint.directory import (
    CheckpointError,
    complete_steps,
    read_manifest,
    retire,
    step_name,
    unfinished_steps,
)
from anychip.train.checkpoint.manifest import Manifest, TensorEntry, checked_extra
from anychip.train.checkpoint.plan import Box, SaveParts, check_fits, plan_load, plan_save
from anychip.train.checkpoint.ranks import Ranks
from anychip.train.checkpoint.save import (
    TensorStream,
    disk_errors,
    failed,
    on_coordinator,
    reason,
    stream_checkpoint,
    write_checkpoint,
)
from anychip.train.checkpoint.shard import ShardReader
from anychip.train.checkpoint.staging import StagingBuffer

_SHOW_PROGRESS_BYTES = 256 << 20
_VERIFY_THREADS = 4


@dataclass(frozen=True)
class SaveReport:
    """What a save took. `stall_seconds` is how long the caller could not train; both times are in seconds."""

    step: int
    nbytes: int
    seconds: float
    stall_seconds: float


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose every byte agreed with its digests when it was opened."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def extra(self) -> dict[str, Any]:
        """The JSON value given to `save`."""
        return dict(self.manifest.extra)

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Name to global shape and dtype, without data."""
        return self.manifest.tensors

    @property
    def nbytes(self) -> int:
        return self.manifest.nbytes


class CheckpointStore:
    """Checkpoints below `root`, one directory a step.

    `keep` is how many of the newest stay after a save (0: all). With a `group`, its ranks write and read together:
    `prepare`, `save`, `save_async`, `wait`, `latest` and `open` are then called by all of them in the same order, and
    `root` is a directory that all of them see. The group must be a gloo group of its own.

    A state is a flat mapping of names to tensors, DTensors of any layout among them; part of a name before the first
    dot is its group (`model`, `optimizer`).
    """

    def __init__(self, root: Path, keep: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self._root, self._keep, self._ranks = root, keep, Ranks(group)
        self._staging = StagingBuffer()
        self._damaged: set[int] = set()
        self._thread: threading.Thread | None = None
        self._task = alive.Task()  # of the thread
        self._report: SaveReport | None = None
        self._failure: AnychipError | None = None

    # Writing

    def prepare(self, state: Mapping[str, Tensor]) -> None:
        """Set aside the host memory that `save_async` of such a state copies into, so that the first one is fast."""
        self._staging.reserve(plan_save(state, self._ranks))

    def save(self, step: int, state: Mapping[str, Tensor], extra: Mapping[str, Any]) -> SaveReport:
        """Write a checkpoint and return when it is published and read back.

        Raises CheckpointError when the disk fails (older checkpoints are untouched, training may go on), InputError
        when `step` already has a good checkpoint or the state cannot be stored.
        """
        started = time.perf_counter()
        self._settle()
        alive.begin("store")
        values = self._check_new(step, extra)
        parts = plan_save(state, self._ranks)
        nbytes = self._write(step, values, parts, parts.tensor)
        seconds = time.perf_counter() - started
        self._report = SaveReport(step, nbytes, seconds, seconds)
        return self._report

    def save_async(self, step: int, state: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        """Copy the state and return; a thread writes it. The state may change as soon as this returns.

        One save is in flight at most: a second one waits for the first. If an earlier one failed, that is said on
        standard error here, or raised by `wait`.
        """
        started = time.perf_counter()
        self._settle()
        alive.begin("snapshot")
        values = self._check_new(step, extra)
        parts = plan_save(state, self._ranks)
        staged = self._staging.copy(parts)
        stall = time.perf_counter() - started

        def write() -> None:
            alive.work_at(self._task)
            try:
                nbytes = self._write(step, values, parts, staged.__getitem__)
                self._report = SaveReport(step, nbytes, time.perf_counter() - started, stall)
            except AnychipError as error:
                self._failure = error
            except BaseException as error:  # a thread has nobody to raise to
                self._failure = CheckpointError(f"checkpoint of step {step} failed: {error!r}", where=self._root)

        self._report = None
        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> SaveReport | None:
        """Wait for the save in flight. Returns the report of the last save; raises what the last one failed with."""
        self._join()
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure
        return self._report

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    @contextmanager
    def stream(self, step: int, extra: Mapping[str, Any]) -> Iterator[TensorStream]:
        """Write a checkpoint tensor by tensor, for a state larger than memory: `stream.add(name, tensor)`.

        One process, whatever the group. It is published when the block ends; an error in the block leaves nothing.
        """
        self._settle()
        values = self._check_new(step, extra)
        with stream_checkpoint(self._root, step, values) as stream:
            yield stream
        self._retain(step)

    # Reading

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint not known to be damaged, ascending."""
        return [step for step in complete_steps(self._root) if step not in self._damaged]

    def newest_step(self) -> int:
        """The newest step with a marker, good or not, the same on all ranks; 0 for none. Waits for a save in flight."""
        self._settle()
        return int(self._ranks.broadcast(max(self.steps(), default=0)))

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint whose every byte agrees with its digests; None when nothing was ever saved.

        A damaged one is passed over with a message. Raises UnfitError when there are some and all are damaged, since
        starting from nothing would then be a loss that nobody asked for.
        """
        self._join()
        steps = self._complete_steps()
        for step in reversed(steps):
            try:
                info = self.open(step)
            except AnychipError as error:
                self._damaged.add(step)
                if self._ranks.is_coordinator:
                    self._pass_over(step, str(error))
            else:
                self._damaged.discard(step)
                return info
        if steps:
            do = "Restore one from a copy, or remove them to start from the beginning."
            raise UnfitError(f"all {len(steps)} checkpoints are damaged.", where=self._root, do=do)
        return None

    def _complete_steps(self) -> list[int]:
        """What the coordinator sees; all raise when it cannot see."""

        def look() -> list[int]:
            found = complete_steps(self._root)
            for step in unfinished_steps(self._root):
                if step > max(found, default=-1):
                    self._pass_over(step, "it was never finished, or has lost the file COMPLETE.")
            return found

        steps, problem = on_coordinator(self._ranks, look)
        if problem:
            raise UnfitError(f"cannot be read ({problem}).", where=self._root, do="See whether its disk is there.")
        return list(steps)

    def _pass_over(self, step: int, why: str) -> None:
        where = self._root / step_name(step)
        said = why if str(where) in why else f"{where}: {why}"
        print(f"warning: checkpoint of step {step} is passed over: {said}", file=sys.stderr, flush=True)

    def open(self, step: int) -> CheckpointInfo:
        """The checkpoint of a step, verified whole; with a group, each rank verifies its share.

        Raises InputError when there is none or its manifest makes no sense, UnfitError naming the file and what is
        wrong with it when it is damaged.
        """
        path = self._root / step_name(step)
        problem: AnychipError | None = None
        try:  # whatever one rank meets, all learn of below
            steps = complete_steps(self._root)
            if step not in steps:
                have = ", ".join(map(str, steps)) or "none"
                raise InputError(f"there is no checkpoint of step {step}.", where=self._root, do=f"There are: {have}.")
            manifest = read_manifest(path)
            _verify(path, manifest, self._ranks)
        except AnychipError as error:
            problem = error
        except OSError as error:
            problem = UnfitError(f"cannot be read ({reason(error)}).", where=path, do="See whether its disk is there.")
        told = self._ranks.gather(str(problem) if problem else None)
        damage = self._ranks.broadcast(next((text for text in told if text), None))
        if problem:
            raise problem
        if damage:
            raise UnfitError(damage)
        return CheckpointInfo(path, manifest)

    def load(self, info: CheckpointInfo, into: Mapping[str, Tensor], *, part: bool = False) -> None:
        """Fill the tensors of `into`, in place, whatever layout they and the checkpoint have.

        `into` names whole groups: with `model.*` alone the optimizer is left out, but a model tensor that the
        checkpoint holds and `into` lacks is an error, unless `part` says that other processes hold the rest (pipeline
        stages). Raises InputError listing the names that do not fit before
        anything is changed, UnfitError when a file was damaged since it was opened.
        """
        check_fits(info.manifest, into, info.path, part=part)
        with torch.no_grad(), ShardReader(info.path) as reader:
            for chunk, entry, copies in plan_load(info.manifest, into):
                data = reader.read(chunk, entry.torch_dtype)
                for copy in copies:
                    copy.target.copy_(data[copy.source])
                alive.progressed()

    def read(self, info: CheckpointInfo, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) one at a time, in the order of the files. Memory: about two tensors."""
        wanted = info.tensors if names is None else {name: info.tensors[name] for name in _known(info, names)}
        with ShardReader(info.path) as reader:
            for name, entry in sorted(wanted.items(), key=lambda item: _place(item[1])):
                tensor = torch.empty(entry.shape, dtype=entry.torch_dtype)
                for chunk in entry.chunks:
                    box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                    tensor[box].copy_(reader.read(chunk, entry.torch_dtype))
                yield name, tensor

    # Inside

    def _write(self, step: int, extra: dict[str, Any], parts: SaveParts, tensor: Callable[[Box], Tensor]) -> int:
        try:
            with disk_errors(self._root / step_name(step)):
                nbytes = write_checkpoint(self._root, step, extra, parts, tensor, self._ranks)
        except CheckpointError:
            self._make_room()
            raise
        self._retain(step)
        return nbytes

    def _join(self) -> None:
        if self._thread:
            if self._thread.is_alive():
                with alive.waiting_for(self._task, "settle"):
                    self._thread.join()
            self._thread = None

    def _settle(self) -> None:
        """Wait for the save in flight; that an older step failed does not stop a newer one from being saved."""
        self._join()
        if self._failure:
            failure, self._failure = self._failure, None
            print(f"warning: {failure} Training goes on.", file=sys.stderr, flush=True)

    def _check_new(self, step: int, extra: Mapping[str, Any]) -> dict[str, Any]:
        values = checked_extra(dict(extra))
        if step < 0:
            raise InputError(f"step {step} of a checkpoint is negative.")
        path = self._root / step_name(step)
        exists, problem = on_coordinator(self._ranks, lambda: step in self.steps())
        if problem:
            raise failed(self._root, step, problem)
        if exists and self._is_good(step):
            do = "Continue from it, or give the run another name."
            raise InputError("is a good checkpoint and is not overwritten.", where=path, do=do)
        return values

    def _is_good(self, step: int) -> bool:
        try:
            self.open(step)
        except AnychipError:
            return False
        return True

    def _retain(self, newest: int) -> None:
        """Remove all but the `keep` newest good checkpoints, and damaged ones older than them."""
        self._damaged.discard(newest)
        if not self._keep or not self._ranks.is_coordinator:
            return
        with suppress(OSError):  # the new checkpoint is there; what cannot be removed now is so after the next save
            kept = {*self.steps()[-self._keep :], newest}
            for step in complete_steps(self._root):
                if step not in kept and step < newest:
                    retire(self._root / step_name(step))

    def _make_room(self) -> None:
        """After a failed save: remove what retention would remove anyway, so that the next one finds more room."""
        if not self._keep or not self._ranks.is_coordinator:
            return
        with suppress(OSError, AnychipError):
            steps = self.steps()
            if len(steps) > self._keep:
                newest = self._root / step_name(steps[-1])
                _verify(newest, read_manifest(newest), Ranks(None))
                for step in steps[: -self._keep]:
                    retire(self._root / step_name(step))


def _verify(path: Path, manifest: Manifest, ranks: Ranks) -> None:
    """Compare every byte with its digest; rank r of n takes every n-th chunk. The first sees that no file is there that
    the manifest does not name: two checkpoints were mixed."""
    if ranks.rank == 0 and (strange := sorted({file.name for file in path.glob("rank-*")} - manifest.files.keys())):
        raise UnfitError(
            f"holds {', '.join(strange[:4])}, which its manifest does not name.",
            where=path,
            do="Move these files away if the rest was not copied over.",
        )
    chunks = manifest.chunks()[ranks.rank :: ranks.size]
    nbytes = sum(chunk.nbytes for chunk in chunks)
    with ShardReader(path) as reader:
        for name, entry in manifest.files.items():
            reader.check_file(name, entry)
        if nbytes < _SHOW_PROGRESS_BYTES:
            for chunk in chunks:
                reader.check_chunk(chunk)
            return
        threads = min(_VERIFY_THREADS, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(threads, initializer=alive.work_at, initargs=(alive.task_here(),))
        with pool, progress("verifying checkpoint", nbytes, "bytes") as bar:
            for chunk, _ in zip(chunks, pool.map(reader.check_chunk, chunks), strict=True):
                bar.advance(chunk.nbytes)


def _known(info: CheckpointInfo, names: Collection[str]) -> Collection[str]:
    unknown = sorted(set(names) - set(info.tensors))
    if unknown:
        raise InputError(f"holds no tensors {', '.join(unknown[:8])}.", where=info.path)
    return names


def _place(entry: TensorEntry) -> tuple[str, int]:
    return min(((chunk.file, chunk.start) for chunk in entry.chunks), default=("", 0))
