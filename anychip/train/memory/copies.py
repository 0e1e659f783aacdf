"""Copies of the state in the memory of this host and of others, every few steps.

Each process writes its part into its host's memory and sends it to the process of the same place on the next hosts
(GEMINI, SOSP 2023): losing a host loses no copy. All of it happens in a thread, over a process group of its own;
training waits only while its state is copied to host memory. A copy counts once all hosts have verified all parts they
hold of it; then the one before it is removed. What is left after a failure is looked for on all hosts: a copy is whole
when some host holds each of its parts, whoever wrote it, in whatever layout. Memory holds two copies and no third: what
a kill left beside the one that was gone back to is removed before the next is written.
"""

from __future__ import annotations

import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from anychip import alive
from anychip.errors import AnychipError
from anychip.train.checkpoint import CheckpointError, CheckpointInfo
from anychip.train.checkpoint.manifest import checked_extra
from anychip.train.checkpoint.plan import SaveParts, plan_save
from anychip.train.checkpoint.ranks import Ranks
from anychip.train.checkpoint.save import reason
from anychip.train.checkpoint.staging import StagingBuffer
from anychip.train.memory.folder import MemoryFolder
from anychip.train.memory.hosts import Hosts
from anychip.train.memory.parts import (
    ATTEMPT_DIGITS,
    accept_part,
    copies_in,
    copy_name,
    record_name,
    shard_name,
    step_of,
    write_part,
)
from anychip.train.memory.search import Found, fetch_missing, find_whole_copies
from anychip.train.memory.transfer import Transfer, move_files

_HELD_AT_ONCE = 2  # a whole copy, and the one that is being written


class MemoryCopies:
    """The copies of one run. Every method but `busy` is called by all processes together, in the same order.

    `peers` is how many other hosts keep what a host writes, as far as there are others. `group` is a gloo group of all
    processes that nothing else uses; None for one process.
    """

    def __init__(self, run: Path, peers: int, group: dist.ProcessGroup | None) -> None:
        self._group, self._ranks = group, Ranks(group)
        self._hosts, self._peers = Hosts.of_environment(self._ranks), peers
        self._folder = MemoryFolder(run, self._hosts, self._ranks)
        mirrors = [self._hosts.mirrors(rank, peers) for rank in range(self._ranks.size)]
        self._mirrors = mirrors[self._ranks.rank]
        self._sources = [rank for rank, those in enumerate(mirrors) if self._ranks.rank in those]
        self._staging = StagingBuffer()
        self._parts: SaveParts | None = None
        # A copy has a name that no other has, whoever wrote it before, so that parts of two are never taken together.
        self._start = self._ranks.broadcast(secrets.token_hex(ATTEMPT_DIGITS // 2 - 4))
        self._copies = 0
        # The copy to go back to, "" for none; None until it is decided what training goes on from.
        self._good: str | None = None
        self._keep_older = False  # those before it too: it is not on enough hosts
        self._tidy = False  # nothing else is left in the folder
        self._thread: threading.Thread | None = None
        self._task = alive.Task()  # of the thread
        self._failure: AnychipError | None = None
        self._warned = False

    # Writing

    def prepare(self, state: Mapping[str, Tensor]) -> None:
        """Set aside the host memory that `save_async` copies into; warn when the folder has too little room."""
        self._parts = plan_save(state, self._ranks)
        self._staging.reserve(self._parts)
        sizes = self._ranks.exchange(self._parts.nbytes)
        held = self._ranks.exchange(self._parts.nbytes + sum(sizes[rank] for rank in self._sources))
        needed = _HELD_AT_ONCE * sum(held[rank] for rank in self._hosts.beside)
        if self._hosts.is_leader:
            room = shutil.disk_usage(self._folder.root).free + _bytes_below(self._folder.path)
            if room < needed:
                print(
                    f"warning: copies of the state need {needed / 2**30:.2f} GiB in {self._folder.root} of this host, "
                    f"and there are {room / 2**30:.2f}: copies that do not fit are left out",
                    file=sys.stderr,
                    flush=True,
                )

    @property
    def busy(self) -> bool:
        """Whether a copy of this process is still on its way."""
        return self._thread is not None and self._thread.is_alive()

    def save_async(self, step: int, state: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        """Copy the state and return; a thread writes and sends it. The state may change as soon as this returns.

        A copy that fails is said once on standard error, until one succeeds; the one before it stays.
        """
        self.wait()
        alive.begin("snapshot")
        values = checked_extra(dict(extra))
        self._parts = parts = self._parts.of(state) if self._parts else plan_save(state, self._ranks)
        staged = self._staging.copy(parts)
        self._copies += 1
        attempt = f"{self._start}{self._copies:08x}"

        def write() -> None:
            alive.work_at(self._task)
            try:
                self._write(step, attempt, values, parts, staged)
            except AnychipError as error:
                self._failure = error
            except Exception as error:  # a thread has nobody to raise to
                self._failure = CheckpointError(f"copy of step {step} in memory failed: {reason(error)}")

        self._thread = threading.Thread(target=write, name=f"memory-copy-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the copy in flight, and say what it failed with."""
        if not self._thread:
            return
        if self._thread.is_alive():
            with alive.waiting_for(self._task, "settle"):
                self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure and not self._warned and self._ranks.is_coordinator:
            print(f"warning: {failure} Training goes on.", file=sys.stderr, flush=True)
        self._warned = failure is not None

    def start_over(self) -> None:
        """The state comes from elsewhere: no copy so far is of what is trained from here on."""
        self.wait()
        self._folder.renew()
        self._go_on_from("", keep_older=False)

    def remove(self) -> None:
        """The run is over, its last state is elsewhere."""
        self.wait()
        self._folder.remove()

    # Reading

    def find(self, at_least: int) -> Iterator[Found]:
        """Whole, verified copies of this step or later, newest first, the same on all processes."""
        self.wait()
        return find_whole_copies(self._folder.path, at_least, self._hosts, self._ranks)

    def fetch(self, found: Found, wanted: Mapping[str, Tensor], *, part: bool) -> CheckpointInfo:
        """What `CheckpointStore.load` takes to fill `wanted`; the files for it come from other hosts where need be.

        Raises InputError when the copy does not fit `wanted`, UnfitError when what arrives is damaged.
        """
        info = fetch_missing(found, self._folder.path, wanted, part, self._hosts, self._ranks, self._group)
        # A kill may have come before enough hosts had all of it: if one is lost now, an older one may be the newest.
        enough = min(self._peers + 1, len(self._hosts.ranks_on))
        self._go_on_from(found.name, keep_older=any(len(hosts) < enough for hosts in found.holders.values()))
        return info

    # Inside

    def _go_on_from(self, good: str, *, keep_older: bool) -> None:
        self._good, self._keep_older, self._tidy = good, keep_older, False

    def _make_room(self) -> None:
        """Remove what earlier processes left beside the copy to go back to, before anyone on this host writes."""
        good = self._good
        if self._tidy or good is None:
            return
        self._remove(lambda name: name != good and not (self._keep_older and step_of(name) < step_of(good)))
        self._ranks.exchange("")
        self._tidy = True

    def _remove(self, unwanted: Callable[[str], bool]) -> None:
        """On this host."""
        if self._hosts.is_leader:
            with suppress(OSError):
                for path in copies_in(self._folder.path):
                    if unwanted(path.name):
                        shutil.rmtree(path, ignore_errors=True)

    def _write(
        self, step: int, attempt: str, extra: dict[str, Any], parts: SaveParts, staged: Mapping[Any, Tensor]
    ) -> None:
        """Write, send, receive, verify; the copy is there for all or for none."""
        me, directory = self._ranks.rank, self._folder.path / copy_name(step, attempt)
        problem, sizes = "", [0, 0]
        self._make_room()
        try:
            record = write_part(directory, step, attempt, (me, self._ranks.size), extra, parts, staged.__getitem__)
            sizes = [record.file.nbytes if record.file else 0, len(record.to_bytes())]
        except Exception as error:
            problem = reason(error)
        told = self._ranks.exchange([problem, sizes])
        problems = [problem for problem, _ in told]
        if not any(problems):
            problems = self._ranks.exchange(self._mirror(directory, [sizes for _, sizes in told]))
        whole = not any(problems)
        self._remove(lambda name: (name != directory.name) == whole)
        if whole:
            self._good, self._tidy = directory.name, True
        else:
            self._keep_older = self._tidy = False  # it may have been their room that it lacked
            first = next(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)
            raise CheckpointError(
                f"copy of step {step} in memory could not be made: {first.rstrip('.')}.",
                where=self._folder.path,
                do="The copy before it stays.",
            )

    def _mirror(self, directory: Path, sizes: list[list[int]]) -> str:
        """Send this process's part to its mirrors and take those that it mirrors; what went wrong, "" for nothing."""
        me = self._ranks.rank
        pairs = [(me, mirror) for mirror in self._mirrors] + [(source, me) for source in self._sources]
        transfers = [
            Transfer(source, target, name, nbytes, tag)
            for source, target in pairs
            for tag, (name, nbytes) in enumerate(zip(_names(source), sizes[source], strict=True))
            if nbytes
        ]
        problem = move_files(transfers, directory, self._group)
        try:
            for source in [] if problem else self._sources:
                accept_part(directory, source)
        except (AnychipError, OSError) as error:
            problem = reason(error)
        return problem


def _names(rank: int) -> tuple[str, str]:
    return shard_name(rank), record_name(rank)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
