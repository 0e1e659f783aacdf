"""Faults on purpose: a supervised run under a seeded schedule of injuries, compared with one that had none.

The schedule depends on the seed alone; when each fault strikes is counted in beats of the processes, not in seconds, as
far as a live machine allows. What must hold is checked on what is left afterwards.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from anychip.errors import AnychipError, UnfitError
from anychip.progress import progress
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.watch import Beat, process_state, read_beat
from anychip.train.checkpoint import CheckpointStore
from anychip.train.checkpoint.directory import complete_steps, step_name
from anychip.train.heartbeat import PHASES

KINDS = ("kill", "stop", "pause", "kill_supervisor", "terminate", "flip_and_kill", "tear_and_kill")
_WEIGHTS = (6, 1, 2, 2, 1, 2, 2)
_MOST_BEATS = 4 * len(PHASES)
_POLL_SECONDS = 0.005
_PAUSE_SECONDS = 0.5
_RECOVERY_SECONDS = 300.0


@dataclass(frozen=True)
class Fault:
    """Strikes `rank` once it has begun `beats` more phases after training came back from the fault before."""

    kind: str
    rank: int
    beats: int


def schedule(seed: int, faults: int, processes: int) -> list[Fault]:
    """The same faults for the same numbers, on any machine."""
    chance = random.Random(seed)
    kinds = chance.choices(KINDS, _WEIGHTS, k=faults)
    return [Fault(kind, chance.randrange(processes), chance.randint(1, _MOST_BEATS)) for kind in kinds]


@dataclass(frozen=True)
class Chaos:
    """What a run under faults came to. `broken` says which invariants did not hold, in words."""

    seed: int
    struck: dict[str, int]
    planned: int
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
            f"seed {self.seed}: {sum(self.struck.values())} of {self.planned} faults struck ({faults}) in "
            f"{self.generations} generations and {self.seconds:.0f} s\n{verdict}"
        )


def chaos(
    recipe: Recipe, recipe_path: Path, words: Sequence[str], runs: Path, processes: int, seed: int, faults: int
) -> Chaos:
    """Train twice below `runs`, calm and rough, on the same data. Raises UnfitError when the calm one fails."""
    calm, rough = (RunDirectory(runs / name / recipe.name) for name in ("calm", "rough"))
    for run in (calm, rough):
        shutil.rmtree(run.root.parent, ignore_errors=True)
    arguments = [str(recipe_path), *words]
    _must_end(["data", "prepare", *arguments, "--runs", str(calm.root.parent)])
    shutil.copytree(calm.root.parent, rough.root.parent)
    options = [*arguments, "--processes", str(processes)]
    _must_end(["supervise", *options, "--runs", str(calm.root.parent)])
    started = time.monotonic()
    striker = _Striker(rough, ["supervise", *options, "--runs", str(rough.root.parent), "--restarts", "1000"])
    planned = schedule(seed, faults, processes)
    with progress("faults", len(planned), "faults") as bar:
        for fault in planned:
            if not striker.strike(fault):
                break
            bar.advance()
    code = striker.finish()
    broken = [*striker.broken]
    if code != 0:
        broken.append(f"the run ended with exit code {code}: {striker.last_words()}")
    broken += _differences(calm, rough, recipe.training.steps)
    return Chaos(seed, dict(striker.struck), faults, len(striker.folders()), time.monotonic() - started, tuple(broken))


def _must_end(arguments: Sequence[str]) -> None:
    result = subprocess.run([sys.executable, "-m", "anychip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UnfitError(f"The run without faults failed: {result.stderr.strip()[-800:]}", do="Mend that first.")


class _Striker:
    """Starts the supervisor, and strikes it and its processes."""

    def __init__(self, run: RunDirectory, arguments: Sequence[str]) -> None:
        self._run, self._arguments = run, list(arguments)
        self._log = run.root.parent / "supervisor.log"
        self.struck: Counter[str] = Counter()
        self.broken: list[str] = []
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "anychip", *self._arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def folders(self) -> list[Path]:
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
            "kill_supervisor": self._kill_supervisor,
            "terminate": self._terminate,
            "flip_and_kill": self._flip_and_kill,
            "tear_and_kill": self._tear_and_kill,
        }[fault.kind](last)
        return True

    def finish(self) -> int:
        return self._process.wait(timeout=_RECOVERY_SECONDS * 10)

    def last_words(self) -> str:
        return self._log.read_text(errors="replace").strip()[-400:]

    def _beat(self, rank: int) -> Beat | None:
        """The newest beat of a process of the newest generation that is alive."""
        folders = self.folders()
        beat = read_beat(folders[-1] / f"rank-{rank:05d}") if folders else None
        return beat if beat is not None and process_state(beat.pid) not in ("", "Z") else None

    def _another_beat(self, last: Beat) -> Beat | None:
        beat = self._beat(last.rank)
        return None if beat == last else beat

    def _wait(self, found: Callable[[], Beat | None]) -> Beat | None:
        deadline = time.monotonic() + _RECOVERY_SECONDS
        while time.monotonic() < deadline:
            if (beat := found()) is not None:
                return beat
            if self._process.poll() is not None:
                return None
            time.sleep(_POLL_SECONDS)
        self.broken.append(f"no recovery within {_RECOVERY_SECONDS:.0f} s")
        return None

    def _check_alone(self) -> None:
        """Only the newest generation lives."""
        for folder in self.folders()[:-1]:
            for path in folder.glob("rank-*"):
                beat = read_beat(path) if path.suffix != ".stack" else None
                if beat is not None and _is_rank_of(beat.pid, folder):
                    self.broken.append(f"process {beat.pid} of {folder.name} outlived it")

    def _kill(self, beat: Beat) -> None:
        _send(beat.pid, signal.SIGKILL)
        self._gone(beat)

    def _stop(self, beat: Beat) -> None:
        _send(beat.pid, signal.SIGSTOP)
        self._gone(beat)

    def _pause(self, beat: Beat) -> None:
        _send(beat.pid, signal.SIGSTOP)
        time.sleep(_PAUSE_SECONDS)
        _send(beat.pid, signal.SIGCONT)

    def _kill_supervisor(self, beat: Beat) -> None:
        self._process.kill()
        self._process.wait()
        self._gone(beat)
        self._start()

    def _terminate(self, beat: Beat) -> None:
        """As a scheduler does before it takes the host away."""
        self._process.terminate()
        code = self._process.wait(timeout=_RECOVERY_SECONDS)
        if code not in (0, 130):
            self.broken.append(f"a request to stop ended with exit code {code}: {self.last_words()}")
        if code != 0:
            self._start()

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

    def _gone(self, beat: Beat) -> None:
        deadline = time.monotonic() + _RECOVERY_SECONDS
        while process_state(beat.pid) not in ("", "Z"):
            if time.monotonic() > deadline:
                self.broken.append(f"process {beat.pid} was never found to hang")
                return
            time.sleep(_POLL_SECONDS)


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


def _differences(calm: RunDirectory, rough: RunDirectory, steps: int) -> list[str]:
    """What is not as if nothing had happened."""
    broken = []
    expected, found = _losses(calm), _losses(rough)
    if [step for step, _ in found] != [step for step, _ in expected]:
        broken.append("the log does not hold every step once, in order")
    elif wrong := [step for (step, one), (_, other) in zip(expected, found, strict=True) if one != other]:
        broken.append(f"losses differ from step {wrong[0]} on")
    try:
        states = [_state(run, steps) for run in (calm, rough)]
    except AnychipError as error:
        return [*broken, f"the final checkpoint cannot be read: {error}"]
    if states[0].keys() != states[1].keys():
        return [*broken, "the final checkpoints hold different tensors"]
    wrong_names = [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
    if wrong_names:
        broken.append(f"{len(wrong_names)} tensors of the final state differ, the first {wrong_names[0]}")
    return broken


def _losses(run: RunDirectory) -> list[tuple[int, float]]:
    path = run.logs / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def _state(run: RunDirectory, steps: int) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run.checkpoints)
    info = store.open(steps)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}
