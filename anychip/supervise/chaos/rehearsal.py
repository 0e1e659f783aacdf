"""Trains twice, calm and under faults, and compares."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anychip.errors import InputError, UnfitError
from anychip.progress import progress
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.chaos.hosts import RunningHosts, many_hosts, one_host
from anychip.supervise.chaos.injuries import Striker
from anychip.supervise.chaos.networks import Networks
from anychip.supervise.chaos.schedule import kinds, schedule
from anychip.supervise.chaos.verdict import broken_history, differences

_END_SECONDS = 3000.0


@dataclass(frozen=True)
class Chaos:
    """What a run under faults came to. `drawn_from` are the kinds that the schedule could hold; `broken` says which
    invariants did not hold, in words."""

    seed: int
    drawn_from: tuple[str, ...]
    struck: dict[str, int]
    planned: int
    failed_saves: int
    generations: int
    seconds: float
    broken: tuple[str, ...]

    def describe(self) -> str:
        faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.struck.items())) or "none"
        verdict = "\n".join(f"BROKEN: {what}" for what in self.broken) or (
            "Every invariant held: every step once, losses and final state to the bit those of a run without faults, "
            "one generation at a time."
        )
        return (
            f"kinds: {', '.join(self.drawn_from)}\n"
            f"seed {self.seed}: {sum(self.struck.values())} of {self.planned} faults struck ({faults}) in "
            f"{self.generations} generations and {self.seconds:.0f} s; {self.failed_saves} saves failed for want of "
            f"room\n{verdict}"
        )


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
    when hosts cannot share the processes, UnfitError when the calm run fails."""
    if processes % hosts:
        raise InputError(f"{hosts} hosts cannot share {processes} processes evenly.", do="Change --processes.")
    calm, rough = (RunDirectory(runs / name / recipe.name) for name in ("calm", "rough"))
    for run in (calm, rough):
        shutil.rmtree(run.root.parent, ignore_errors=True)
    networks = Networks(hosts) if own_networks else None  # first: without it there is not even a loopback
    arguments = [str(recipe_path), *words]
    _must_end(["data", "prepare", *arguments, "--runs", str(calm.root.parent)])
    shutil.copytree(calm.root.parent, rough.root.parent)
    _must_end(["supervise", *arguments, "--processes", str(processes), "--runs", str(calm.root.parent)])
    started, folder = time.monotonic(), rough.root.parent
    command = ["supervise", *arguments, "--runs", str(folder), "--restarts", "1000"]
    places = many_hosts(command, processes, hosts, folder, networks) if hosts > 1 else one_host(command, processes)
    weights = kinds(hosts, networks is not None)
    planned = schedule(seed, faults, processes, weights)
    with RunningHosts(places, folder) as running, progress("faults", len(planned), "faults") as bar:
        striker = Striker(rough, running, recipe.checkpoint.save_interval, networks)
        for fault in planned:
            if not striker.strike(fault):
                break
            bar.advance()
        codes = running.wait(_END_SECONDS)
        broken = [*striker.broken]
        if any(codes):
            broken.append(f"the run ended with exit codes {codes}: {running.last_words()}")
    broken += differences(calm, rough, recipe.training.steps)
    broken += broken_history(rough, hosts, processes) if hosts > 1 else []
    return Chaos(
        seed,
        tuple(weights),
        dict(striker.struck),
        faults,
        striker.failed_saves,
        len(striker.generations()),
        time.monotonic() - started,
        tuple(broken),
    )


def _must_end(arguments: Sequence[str]) -> None:
    result = subprocess.run([sys.executable, "-m", "anychip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UnfitError(f"The run without faults failed: {result.stderr.strip()[-800:]}", do="Mend that first.")
