"""Trains twice, calm and under faults, and compares."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from anychip.errors import InputError, UnfitError
from anychip.progress import progress
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.chaos.history import FOLDER_VARIABLE, History
from anychip.supervise.chaos.hosts import RunningHosts, many_hosts, one_host
from anychip.supervise.chaos.injuries import Striker
from anychip.supervise.chaos.invariants import broken_invariants
from anychip.supervise.chaos.networks import Networks
from anychip.supervise.chaos.schedule import kinds, left_out, schedule
from anychip.supervise.chaos.verdict import broken_generations, differences

_END_SECONDS = 3000.0
_SPARE = 1.2  # more steps than the faults that struck took each


@dataclass(frozen=True)
class Chaos:
    """What a run under faults came to. `drawn_from` are the kinds that the schedule could hold; `unmet` of those that
    struck came as a plain kill or not at all, since no process came to the point that they were meant for; `broken`
    says which invariants did not hold, in words; `step` is that of the last fault, of `steps`."""

    seed: int
    drawn_from: tuple[str, ...]
    left_out: tuple[str, ...]
    struck: dict[str, int]
    unmet: int
    planned: int
    step: int
    steps: int
    failed_saves: int
    generations: int
    facts: int
    seconds: float
    broken: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether everything that was planned struck and left no trace."""
        return not self.broken and self.missing == 0

    @property
    def missing(self) -> int:
        return self.planned - sum(self.struck.values())

    def describe(self) -> str:
        struck = sum(self.struck.values())
        faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.struck.items())) or "none"
        lines = [
            f"kinds: {', '.join(self.drawn_from)}",
            *(f"left out: {text}" for text in self.left_out),
            f"seed {self.seed}: {struck} of {self.planned} faults struck ({faults}; {self.unmet} of them found no "
            f"process at the point they were meant for) in {self.generations} generations and {self.seconds:.0f} s; "
            f"{self.failed_saves} saves failed for want of room; {self.facts} facts in the history",
        ]
        if self.missing:
            need = math.ceil(_SPARE * self.steps * self.planned / max(struck, 1) / 100) * 100
            lines.append(
                f"INCOMPLETE: training ended before {self.missing} faults had struck. Raise training.steps from "
                f"{self.steps} to about {need}."
            )
        lines += [f"BROKEN: {what}" for what in self.broken]
        if not self.broken:
            lines.append(
                "Every invariant held: in what is left every step was made once, with the batch and the loss of a run "
                "without faults; one process of one generation at a time saved, ever newer steps; every state that was "
                "restored had been saved, and was the newest good one; the end is that of the calm run to the bit."
            )
        return "\n".join(lines)


def chaos(
    recipe: Recipe,
    recipe_path: Path,
    words: Sequence[str],
    runs: Path,
    processes: int,
    seed: int,
    faults: int,
    hosts: int = 1,
    own_networks: bool = False,
) -> Chaos:
    """Train twice below `runs`, on the same data: on one host without faults, and on `hosts` of them with. `processes`
    are those of all hosts; `own_networks`: this runs inside namespaces, where hosts can be cut off. Raises InputError
    when hosts cannot share the processes or the model grows, UnfitError when the calm run fails."""
    if processes % hosts:
        raise InputError(f"{hosts} hosts cannot share {processes} processes evenly.", do="Change --processes.")
    if recipe.grow:
        raise InputError("a model that grows has several histories.", where="grow", do="Use --set 'grow=[]'.")
    calm, rough = (RunDirectory(runs / name / recipe.name) for name in ("calm", "rough"))
    histories = [runs / "calm-history", runs / "rough-history"]
    for folder in (calm.root.parent, rough.root.parent, *histories):
        shutil.rmtree(folder, ignore_errors=True)
    networks = Networks(hosts) if own_networks else None  # first: without it there is not even a loopback
    arguments = [str(recipe_path), *words]
    calm_words = ["supervise", *arguments, "--processes", str(processes), "--runs", str(calm.root.parent)]
    _must_end(["data", "prepare", *arguments, "--runs", str(calm.root.parent)])
    shutil.copytree(calm.root.parent, rough.root.parent)
    with History(histories[0]) as told_of_calm:
        _must_end(calm_words, {FOLDER_VARIABLE: str(histories[0])})
    started, folder = time.monotonic(), rough.root.parent
    command = ["supervise", *arguments, "--runs", str(folder), "--restarts", "1000"]
    places = many_hosts(command, processes, hosts, folder, networks) if hosts > 1 else one_host(command, processes)
    weights = kinds(recipe, hosts, networks is not None)
    planned, broken = schedule(seed, faults, processes, weights), list[str]()
    with (
        History(histories[1]) as told,
        RunningHosts(places, folder, histories[1]) as running,
        progress("faults", len(planned), "faults") as bar,
    ):
        striker = Striker(rough, running, recipe, networks, histories[1])
        for fault in planned:
            if not striker.strike(fault):
                break
            bar.advance()
        codes = running.wait(_END_SECONDS)
        broken += striker.broken
        if any(codes):
            broken.append(f"the run ended with exit codes {codes}: {running.last_words()}")
    steps, facts = recipe.training.steps, told.rows()
    broken += differences(calm, rough, steps)
    broken += broken_invariants(told_of_calm.rows(), facts, steps)
    broken += broken_generations(rough, hosts, processes) if hosts > 1 else []
    return Chaos(
        seed=seed,
        drawn_from=tuple(weights),
        left_out=tuple(left_out(recipe)),
        struck=dict(striker.struck),
        unmet=striker.unmet,
        planned=faults,
        step=striker.step,
        steps=steps,
        failed_saves=striker.failed_saves,
        generations=striker.newest(),
        facts=len(facts),
        seconds=time.monotonic() - started,
        broken=tuple(broken),
    )


def _must_end(arguments: Sequence[str], more: Mapping[str, str] = MappingProxyType({})) -> None:
    command = [sys.executable, "-m", "anychip", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **more})
    if result.returncode:
        raise UnfitError(f"The run without faults failed: {result.stderr.strip()[-800:]}", do="Mend that first.")
