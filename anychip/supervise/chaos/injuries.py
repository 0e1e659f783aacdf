"""How each kind of fault strikes, and what must hold in that moment."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from anychip.errors import EXIT_UNFIT
from anychip.files import write_text
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.chaos.disks import damage_newest, damaged_tokens, no_room
from anychip.supervise.chaos.history import Teller
from anychip.supervise.chaos.hosts import RunningHosts
from anychip.supervise.chaos.inside import wish_path
from anychip.supervise.chaos.networks import Networks
from anychip.supervise.chaos.schedule import Fault
from anychip.supervise.chaos.spots import OF_THE_FIRST
from anychip.supervise.chaos.watching import RECOVERY_SECONDS, Sight
from anychip.supervise.decide import EXIT_STOPPED
from anychip.supervise.watch import Beat
from anychip.train.checkpoint.directory import complete_steps
from anychip.train.guard import LOG_NAME as GUARD_LOG

_PAUSE_SECONDS = 0.5
_SLOW_SECONDS, _SLOW_SLICE_SECONDS = 2.0, 0.03
_FULL_SECONDS = 5.0
_UNMET_STEPS = 24  # after which a point that was to be met is given up
# Those that every save comes to, and every start.
_IN_SAVE = ("copy", "plan", "open", "write", "flush", "publish", "retain")
_IN_MEMORY = ("memory_write", "memory_send", "memory_remove")
_STARTING = ("rendezvous", "restore", "load")
_STARTING_FROM_MEMORY = ("memory_find", "memory_fetch")
_ERRORS = tuple(f"{spot} {error}" for spot in ("open", "write", "flush") for error in ("EIO", "EROFS"))


class Striker(Sight):
    """Strikes hosts and the processes on them. `failed_saves` counts the times that a full disk cost a checkpoint;
    `unmet` the points that no process came to, so that a plain kill struck instead."""

    def __init__(
        self, run: RunDirectory, hosts: RunningHosts, recipe: Recipe, networks: Networks | None, history: Path
    ) -> None:
        super().__init__(run, hosts)
        self._recipe, self._networks, self._folder, self._teller = recipe, networks, history, Teller(history)
        self.struck: Counter[str] = Counter()
        self.unmet = self.failed_saves = self.step = 0

    def strike(self, fault: Fault) -> bool:
        """Wait for the moment and strike; False when training ended first."""
        begun = self.wait(lambda: self.beat(fault.rank))
        seen, last = 0, begun
        while last is not None and seen < fault.beats:
            seen, last = seen + 1, self.wait(partial(self.another_beat, last))
        if last is None:
            return False
        self.check_alone()
        self.struck[fault.kind] += 1
        self.step = last.step
        self._teller.tell("struck", kind=fault.kind, rank=fault.rank, step=last.step)
        strikes: dict[str, Callable[[Beat], None]] = {
            "kill": self._kill,
            "kill_in_save": partial(self._kill_in_save, choice=fault.choice),
            "kill_again": partial(self._kill_again, choice=fault.choice),
            "stop": self._stop,
            "pause": self._pause,
            "slow": self._slow,
            "terminate": self._terminate,
            "flip_and_kill": partial(self._flip_and_kill, choice=fault.choice),
            "tear_and_kill": self._tear_and_kill,
            "full_disk": self._full_disk,
            "disk_error": partial(self._disk_error, choice=fault.choice),
            "damaged_data": partial(self._damaged_data, choice=fault.choice),
            "flip_in_memory": partial(self._flip_in_memory, choice=fault.choice),
            "not_a_number": self._not_a_number,
            "kill_supervisor": self._kill_agent,
            "kill_agent": self._kill_agent,
            "kill_coordinator": self._kill_coordinator,
            "kill_host": self._kill_host,
            "partition": partial(self._partition, ways="both"),
            "partition_out": partial(self._partition, ways="out"),
            "partition_in": partial(self._partition, ways="in"),
        }
        strikes[fault.kind](last)
        return True

    # Processes

    def _kill(self, beat: Beat) -> None:
        _send(beat.pid, signal.SIGKILL)
        self.gone(beat)

    def _kill_in_save(self, beat: Beat, choice: int) -> None:
        """At a point of a save, to disk or to memory."""
        spots = _IN_SAVE + (_IN_MEMORY if self._recipe.checkpoint.memory_interval else ())
        spot = spots[choice % len(spots)]
        rank = 0 if spot in OF_THE_FIRST else beat.rank
        if not self._ask(rank, f"die at {spot}", beat.step):
            self.unmet += 1
            self._kill(self.beat(beat.rank) or beat)

    def _kill_again(self, beat: Beat, choice: int) -> None:
        """A kill, and another one of the process that is started then, before it has made a step."""
        spots = _STARTING + (_STARTING_FROM_MEMORY if self._recipe.checkpoint.memory_interval else ())
        wish = self._wish(beat.rank, f"die at {spots[choice % len(spots)]}")
        self._kill(beat)
        self.wait(lambda: None if wish.exists() and not self._is_back(beat) else True)
        if wish.exists():
            wish.unlink(missing_ok=True)
            self.unmet += 1

    def _is_back(self, beat: Beat) -> bool:
        now = self.beat(beat.rank)
        return now is not None and now.pid != beat.pid

    def _stop(self, beat: Beat) -> None:
        _send(beat.pid, signal.SIGSTOP)
        self.gone(beat)

    def _pause(self, beat: Beat) -> None:
        with self.without_restart("a pause"):
            _send(beat.pid, signal.SIGSTOP)
            time.sleep(_PAUSE_SECONDS)
            _send(beat.pid, signal.SIGCONT)

    def _slow(self, beat: Beat) -> None:
        """Half of the time stopped."""
        end = time.monotonic() + _SLOW_SECONDS
        with self.without_restart("slowness"):
            while time.monotonic() < end:
                _send(beat.pid, signal.SIGSTOP)
                time.sleep(_SLOW_SLICE_SECONDS)
                _send(beat.pid, signal.SIGCONT)
                time.sleep(_SLOW_SLICE_SECONDS)

    # Numbers

    def _flip_in_memory(self, beat: Beat, choice: int) -> None:
        """One bit of what one process holds; the copies of others tell, or its own digest."""
        self._suffer(beat, f"flip {('weight', 'optimizer')[choice % 2]} {choice // 2}", "a bit turned over in memory")

    def _not_a_number(self, beat: Beat) -> None:
        """Once; the step computed again is as it should have been."""
        self._suffer(beat, "nan", "a loss that was no number")

    def _suffer(self, beat: Beat, wish: str, what: str) -> None:
        """Must be found, and mended without a restart."""
        log = self._run.logs / GUARD_LOG
        before = log.stat().st_size if log.is_file() else 0
        with self.without_restart(what):
            if self._ask(beat.rank, wish, beat.step):
                hurt = self.beat(beat.rank) or beat
                self.wait(lambda: self._past(hurt, hurt.step + 3, float("inf")))
                if not log.is_file() or log.stat().st_size == before:
                    self.broken.append(f"{what} was not found ({wish})")
            else:
                self.unmet += 1

    def _ask(self, rank: int, wish: str, step: int) -> bool:
        """Let a process hurt itself; False when it did not come to that point."""
        path = self._wish(rank, wish)
        self.wait(lambda: None if path.exists() and not self._is_past(rank, step + _UNMET_STEPS) else True)
        try:
            path.unlink()
            return False
        except FileNotFoundError:
            return True

    def _wish(self, rank: int, wish: str) -> Path:
        path = wish_path(self._folder, rank)
        write_text(path, wish)
        return path

    def _is_past(self, rank: int, step: int) -> bool:
        now = self.beat(rank)
        return now is not None and now.step > step

    # Disks

    def _flip_and_kill(self, beat: Beat, choice: int) -> None:
        def flip(data: bytearray) -> None:
            data[-1 - choice // 8 % (len(data) // 2)] ^= 1 << choice % 8

        damage_newest(self._run, flip, self._tell_damage)
        self._kill(beat)

    def _tear_and_kill(self, beat: Beat) -> None:
        def tear(data: bytearray) -> None:
            del data[len(data) // 2 :]

        damage_newest(self._run, tear, self._tell_damage)
        self._kill(beat)

    def _tell_damage(self, step: int) -> None:
        self._teller.tell("damaged", step=step)

    def _damaged_data(self, beat: Beat, choice: int) -> None:
        """The run stops and names the file; once that is restored, it goes on."""
        with damaged_tokens(self._run, choice) as names:
            self._kill(beat)
            codes = self._hosts.wait(RECOVERY_SECONDS)
            if set(codes) == {0}:  # training had ended
                self.unmet += 1
                return
            if set(codes) != {EXIT_UNFIT} or not any(name in self._hosts.last_words() for name in names):
                self.broken.append(f"damaged tokens led to exit codes {codes}: {self._hosts.last_words()}")
        for number, code in enumerate(codes):
            if code is not None:
                self._hosts.start(number)

    def _disk_error(self, beat: Beat, choice: int) -> None:
        """One file of a save fails; training goes on, and then a kill shows whether what is left is good."""
        with self.without_restart("an error of the disk"):
            met = self._ask(beat.rank, f"fail at {_ERRORS[choice % len(_ERRORS)]}", beat.step)
            now = self.beat(beat.rank) or beat
            self.wait(lambda: self._past(now, now.step + 1, float("inf")))
        self.unmet += not met
        self._kill(self.beat(beat.rank) or beat)

    def _full_disk(self, beat: Beat) -> None:
        """No file grows beyond a few kilobytes until a save has failed, then there is room again, then a kill."""
        interval = self._recipe.checkpoint.save_interval
        due = (beat.step // interval + 1) * interval if interval else beat.step
        deadline = time.monotonic() + _FULL_SECONDS
        with self.without_restart("a full disk"):
            with no_room([each.pid for each in self.beats()]):
                now = self.wait(lambda: self._past(beat, due + 2, deadline))
            newest = max(complete_steps(self._run.checkpoints), default=0)
            self.failed_saves += now is not None and now.step > due > newest
            # What is logged of a step waits in memory for room, and is written with the next step.
            deadline = time.monotonic() + _FULL_SECONDS
            now = self.wait(lambda: self._past(beat, (now.step if now else due) + 2, deadline))
        if now is not None:
            self._kill(now)

    def _past(self, beat: Beat, step: int, deadline: float) -> Beat | None:
        """The beat of the same process once it is past this step, or of any once the time is over."""
        now = self.beat(beat.rank)
        return now if now and (now.step > step or now.pid != beat.pid or time.monotonic() > deadline) else None

    # Hosts

    def _kill_agent(self, beat: Beat) -> None:
        number = self._host_of(beat)
        self._hosts.kill(number)
        self.gone(beat)
        self._hosts.start(number)

    def _kill_host(self, beat: Beat) -> None:
        number = self._host_of(beat)
        self._hosts.kill(number)
        self.gone(beat)
        self._teller.tell("forgot", host=number)
        self._hosts.forget_memory(number)
        self._hosts.start(number)

    def _kill_coordinator(self, beat: Beat) -> None:
        self._hosts.kill_coordinator()

    def _partition(self, beat: Beat, ways: str) -> None:
        assert self._networks is not None
        number = self._host_of(beat)
        self._networks.cut(number, ways)
        self.gone(beat)
        self._networks.mend(number, ways)

    def _terminate(self, beat: Beat) -> None:
        """As a scheduler does before it takes the host away; the others are too few without it."""
        self._hosts.terminate(self._host_of(beat))
        codes = self._hosts.wait(RECOVERY_SECONDS)
        if any(code not in (0, EXIT_STOPPED) for code in codes):
            self.broken.append(f"a request to stop ended with exit codes {codes}: {self._hosts.last_words()}")
        for number, code in enumerate(codes):
            if code not in (0, None):
                self._hosts.start(number)

    def _host_of(self, beat: Beat) -> int:
        """Any host will do; the schedule says which by the rank."""
        return beat.rank % len(self._hosts)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended by itself in this moment
        return
