"""The chips of this host as what generations run on."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence

from anychip.errors import InputError
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.decide import Chips
from anychip.supervise.lock import only_supervisor
from anychip.supervise.processes import Generation, Place, Running, next_number, open_store, train_command
from anychip.supervise.run import Limits, Stop, Supervisor, check_layout, is_possible, stop_signals

_LOOPBACK = "127.0.0.1"


def supervise(
    recipe: Recipe,
    run: RunDirectory,
    arguments: Sequence[str],
    processes: int,
    limits: Limits,
    min_processes: int = 0,
) -> None:
    """Run `anychip train ARGUMENTS` in this many processes until it is done; with fewer than `min_processes` (0: than
    `processes`) it is never tried. Raises RunFailed when it cannot be done, InputError for what cannot work,
    and while another supervisor holds the run."""
    if min_processes > processes:
        do = f"Give at most {processes}."
        raise InputError(f"{min_processes} is more than --processes {processes}.", where="--min-processes", do=do)
    check_layout(recipe, processes)
    chips = Chips(list(range(processes)), min_processes or processes, lambda count: is_possible(recipe, count))
    with only_supervisor(run), stop_signals() as stop:
        Supervisor(run, OneHost(run, chips, train_command(arguments)), limits, stop).run()


class OneHost:
    """Every generation has a store of its own, on loopback."""

    def __init__(self, run: RunDirectory, chips: Chips, command: Sequence[str]) -> None:
        self._run, self._chips, self._command = run, chips, command

    def start(self, stop: Stop) -> Running | None:
        if stop.requests:
            return None
        slots, number = list(self._chips.slots), next_number(self._run)
        self._store, port = open_store(_LOOPBACK)  # lives as long as the generation
        place = Place(slots, 0, len(slots), 0, 1, _LOOPBACK, port, secrets.token_hex(16))
        return Generation(number, place, self._command, self._run)

    def change(self) -> str | None:
        return None

    def leave_out(self, generation: Running, rank: int, why: str) -> str | None:
        if not self._chips.leave_out(rank):
            return None
        print(f"using chips {', '.join(map(str, self._chips.slots))}", file=sys.stderr, flush=True)
        return "shrink"

    def unit(self, generation: Running, rank: int) -> str:
        return str(self._chips.slots[rank])

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)
