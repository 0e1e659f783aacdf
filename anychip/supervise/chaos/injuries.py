"""How each kind of fault strikes, and what must hold in that moment."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from anychip.rundir import RunDirectory
from anychip.supervise.chaos.hosts import RunningHosts
from anychip.supervise.chaos.networks import Networks
from anychip.supervise.chaos.schedule import Fault
from anychip.supervise.decide import EXIT_STOPPED
from anychip.supervise.watch import Beat, process_state, read_beat
from anychip.train.checkpoint.directory import complete_steps, step_name
from anychip.train.heartbeat import BEFORE_TRAINING

_POLL_SECONDS = 0.005
_PAUSE_SECONDS = 0.5
_SLOW_SECONDS, _SLOW_SLICE_SECONDS = 2.0, 0.03
_FULL_SECONDS, _FULL_BYTES = 5.0, 4096
_RECOVERY_SECONDS = 300.0


class Striker:
    """Strikes hosts and the processes on them. `broken` is what did not hold, in words; `failed_saves` counts the
    times that a full disk cost a checkpoint."""

    def __init__(self, run: RunDirectory, hosts: RunningHosts, save_interval: int, networks: Networks | None) -> None:
        self._run, self._hosts, self._save_interval, self._networks = run, hosts, save_interval, networks
        self.struck: Counter[str] = Counter()
        self.broken: list[str] = []
        self.failed_saves = 0

    def generations(self) -> list[Path]:
        """The folders of heartbeats, oldest first."""
        return sorted((self._run.logs / "heartbeats").glob("generation-*"))

    def strike(self, fault: Fault) -> bool:
        """Wait for the moment and strike; False when training ended first."""
        begun = self._wait(lambda: self._beat(fault.rank))
        seen, last = 0, begun
        while last is not None and seen < fault.beats:
            seen, last = seen + 1, self._wait(partial(self._another_beat, last))
        if last is None:
            return False
        self._check_alone()
        self.struck[fault.kind] += 1
        {
            "kill": self._kill,
            "stop": self._stop,
            "pause": self._pause,
            "slow": self._slow,
            "terminate": self._terminate,
            "flip_and_kill": self._flip_and_kill,
            "tear_and_kill": self._tear_and_kill,
            "full_disk": self._full_disk,
            "kill_supervisor": self._kill_agent,
            "kill_agent": self._kill_agent,
            "kill_coordinator": self._kill_coordinator,
            "kill_host": self._kill_host,
            "partition": self._partition,
        }[fault.kind](last)
        return True

    # Processes

    def _kill(self, beat: Beat) -> None:
        _send(beat.pid, signal.SIGKILL)
        self._gone(beat)

    def _stop(self, beat: Beat) -> None:
        _send(beat.pid, signal.SIGSTOP)
        self._gone(beat)

    def _pause(self, beat: Beat) -> None:
        with self._without_restart("a pause"):
            _send(beat.pid, signal.SIGSTOP)
            time.sleep(_PAUSE_SECONDS)
            _send(beat.pid, signal.SIGCONT)

    def _slow(self, beat: Beat) -> None:
        """Half of the time stopped."""
        end = time.monotonic() + _SLOW_SECONDS
        with self._without_restart("slowness"):
            while time.monotonic() < end:
                _send(beat.pid, signal.SIGSTOP)
                time.sleep(_SLOW_SLICE_SECONDS)
                _send(beat.pid, signal.SIGCONT)
                time.sleep(_SLOW_SLICE_SECONDS)

    # Disks

    def _flip_and_kill(self, beat: Beat) -> None:
        place = -1 - self.struck["flip_and_kill"]  # never the same twice: that would mend it

        def flip(data: bytearray) -> None:
            data[place] ^= 4

        self._damage(flip)
        self._kill(beat)

    def _tear_and_kill(self, beat: Beat) -> None:
        def tear(data: bytearray) -> None:
            del data[len(data) // 2 :]

        self._damage(tear)
        self._kill(beat)

    def _damage(self, change: Callable[[bytearray], None]) -> None:
        """Change a file of the newest checkpoint, if an older one is there to fall back on."""
        steps = complete_steps(self._run.checkpoints)
        if len(steps) < 2:
            return
        for path in sorted((self._run.checkpoints / step_name(steps[-1])).glob("*.safetensors"))[:1]:
            data = bytearray(path.read_bytes())
            change(data)
            path.write_bytes(data)

    def _full_disk(self, beat: Beat) -> None:
        """No file grows beyond a few kilobytes until a save has failed, then there is room again, then a kill."""
        due = (beat.step // self._save_interval + 1) * self._save_interval if self._save_interval else beat.step
        deadline = time.monotonic() + _FULL_SECONDS
        with self._without_restart("a full disk"):
            with _no_room([each.pid for each in self._beats()]):
                now = self._wait(lambda: self._past(beat, due + 2, deadline))
            newest = max(complete_steps(self._run.checkpoints), default=0)
            self.failed_saves += now is not None and now.step > due > newest
            # What is logged of a step waits in memory for room, and is written with the next step.
            deadline = time.monotonic() + _FULL_SECONDS
            now = self._wait(lambda: self._past(beat, (now.step if now else due) + 2, deadline))
        if now is not None:
            self._kill(now)

    def _past(self, beat: Beat, step: int, deadline: float) -> Beat | None:
        """The beat of the same process once it is past this step, or of any once the time is over."""
        now = self._beat(beat.rank)
        return now if now and (now.step > step or now.pid != beat.pid or time.monotonic() > deadline) else None

    # Hosts

    def _kill_agent(self, beat: Beat) -> None:
        number = self._host_of(beat)
        self._hosts.kill(number)
        self._gone(beat)
        self._hosts.start(number)

    def _kill_host(self, beat: Beat) -> None:
        number = self._host_of(beat)
        self._hosts.kill(number)
        self._gone(beat)
        self._hosts.forget_memory(number)
        self._hosts.start(number)

    def _kill_coordinator(self, beat: Beat) -> None:
        self._hosts.kill_coordinator()

    def _partition(self, beat: Beat) -> None:
        assert self._networks is not None
        number = self._host_of(beat)
        self._networks.cut(number)
        self._gone(beat)
        self._networks.mend(number)

    def _terminate(self, beat: Beat) -> None:
        """As a scheduler does before it takes the host away; the others are too few without it."""
        self._hosts.terminate(self._host_of(beat))
        codes = self._hosts.wait(_RECOVERY_SECONDS)
        if any(code not in (0, EXIT_STOPPED) for code in codes):
            self.broken.append(f"a request to stop ended with exit codes {codes}: {self._hosts.last_words()}")
        for number, code in enumerate(codes):
            if code not in (0, None):
                self._hosts.start(number)

    def _host_of(self, beat: Beat) -> int:
        """Any host will do; the schedule says which by the rank."""
        return beat.rank % len(self._hosts)

    # Watching

    def _beat(self, rank: int) -> Beat | None:
        """The newest beat of a process of the newest generation that is alive and came to training."""
        trains = (beat for beat in self._beats() if beat.phase not in BEFORE_TRAINING)
        return next((beat for beat in trains if beat.rank == rank), None)

    def _beats(self) -> list[Beat]:
        found = [read_beat(path) for folder in self.generations()[-1:] for path in _files(folder)]
        return [beat for beat in found if beat is not None and process_state(beat.pid) not in ("", "Z")]

    def _another_beat(self, last: Beat) -> Beat | None:
        beat = self._beat(last.rank)
        return None if beat == last else beat

    def _wait(self, found: Callable[[], Beat | None]) -> Beat | None:
        deadline = time.monotonic() + _RECOVERY_SECONDS
        while time.monotonic() < deadline:
            if (beat := found()) is not None:
                return beat
            if self._hosts.any_ended():
                return None
            time.sleep(_POLL_SECONDS)
        self.broken.append(f"no recovery within {_RECOVERY_SECONDS:.0f} s")
        return None

    def _gone(self, beat: Beat) -> None:
        deadline = time.monotonic() + _RECOVERY_SECONDS
        while process_state(beat.pid) not in ("", "Z"):
            if time.monotonic() > deadline:
                self.broken.append(f"process {beat.pid} was never ended")
                return
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _without_restart(self, what: str) -> Iterator[None]:
        before = len(self.generations())
        yield
        if len(self.generations()) != before:
            self.broken.append(f"{what} led to a restart")

    def _check_alone(self) -> None:
        """Only the newest generation lives."""
        for folder in self.generations()[:-1]:
            for path in _files(folder):
                beat = read_beat(path)
                if beat is not None and _is_rank_of(beat.pid, folder):
                    self.broken.append(f"process {beat.pid} of {folder.name} outlived it")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("rank-*") if not path.suffix]


@contextmanager
def _no_room(pids: Sequence[int]) -> Iterator[None]:
    """As if the disk were full, for these processes: the kernel refuses to let their files grow (EFBIG)."""
    limits = {}
    for pid in pids:
        try:
            soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FULL_BYTES, hard))
            limits[pid] = soft, hard
        except ProcessLookupError:
            continue
    try:
        yield
    finally:
        for pid, limit in limits.items():
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
            except ProcessLookupError:
                continue


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended by itself in this moment
        return


def _is_rank_of(pid: int, folder: Path) -> bool:
    """Whether a process of this number is one that this generation started."""
    try:
        return f"ANYCHIP_HEARTBEATS={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
