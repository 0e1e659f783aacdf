"""The planner's expected time of a run with failures, held against real runs that are killed at random.

Two processes train a small model under `anychip supervise`, with copies of the state in host memory. First without
faults (seconds of a step), then under a few kills (seconds to come back): these two numbers go into `plan`'s formula.
Then a run is killed at random times until it ends, and its time is compared with the formula's. Times between kills are
exponential, one from each of 12 equally likely ranges in a random order and so on: the mean comes out as asked, where
freely drawn ones would leave several percent to luck. Kills that come faster than training comes back are answered by
longer and longer waits, which the formula does not have.

    python benchmarks/goodput.py --mtbf 40 --kills 12 --interval 20
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RECIPE = Path(__file__).parent.parent / "recipes/demo.yaml"
PROCESSES = 2
_POLL_SECONDS = 0.002
_STRATA = 12


@dataclass(frozen=True)
class Place:
    """What one process said last."""

    pid: int
    step: int
    at: float


class Run:
    """A supervised run in a folder of its own."""

    def __init__(self, folder: Path, name: str, steps: int, interval: int) -> None:
        self.heartbeats = folder / name / "logs" / "heartbeats"
        settings = {
            "name": name,
            "grow": "[]",
            "model.hidden_size": 64,
            "model.intermediate_size": 128,
            "model.num_hidden_layers": 2,
            "model.num_attention_heads": 2,
            "training.steps": steps,
            "training.micro_batch_size": 4,
            "training.eval_interval": 0,
            "training.eval_tokens": 256,
            "checkpoint.save_interval": 0,
            "checkpoint.memory_interval": interval,
        }
        words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        self.arguments = [str(RECIPE), "--runs", str(folder), *words]
        self.process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        subprocess.run([sys.executable, "-m", "anychip", "data", "prepare", *self.arguments], check=True)

    def start(self) -> None:
        command = [sys.executable, "-m", "anychip", "supervise", *self.arguments, "--processes", str(PROCESSES)]
        command += ["--restarts", "1000"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def running(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def generation(self) -> int:
        names = [path.name for path in self.heartbeats.glob("generation-*")]
        return max((int(name.removeprefix("generation-")) for name in names), default=0)

    def place(self, generation: int, rank: int) -> Place | None:
        path = self.heartbeats / f"generation-{generation:04d}" / f"rank-{rank:05d}"
        try:
            row = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return Place(row["pid"], row["step"], row["at"])

    def wait_for_step(self, generation: int, beyond: int = 0) -> Place | None:
        """The first word of rank 0 of this generation in a later step than `beyond`; None when the run has ended."""
        while self.running():
            place = self.place(generation, 0)
            if place is not None and place.step > beyond:
                return place
            time.sleep(_POLL_SECONDS)
        return None


def calm(folder: Path, steps: int, interval: int) -> float:
    """Seconds of a step, copies to memory included."""
    run = Run(folder, "calm", steps, interval)
    run.prepare()
    run.start()
    first = run.wait_for_step(run.generation() or 1, 20)
    assert first is not None
    last = first
    while run.running():
        last = run.place(1, 0) or last
        time.sleep(0.05)
    return (last.at - first.at) / (last.step - first.step)


def recoveries(folder: Path, count: int, step_seconds: float, interval: int) -> list[float]:
    """Seconds from a death to the first new step, each beyond the time that the step itself takes."""
    run = Run(folder, "recoveries", 10_000_000, interval)
    run.prepare()
    run.start()
    chance, found = random.Random(1), []
    for generation in range(1, count + 1):
        begun = run.wait_for_step(generation)
        assert begun is not None
        time.sleep(2.0)
        victim = run.place(generation, chance.randrange(PROCESSES))
        assert victim is not None
        struck = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        restored = run.wait_for_step(generation + 1)
        assert restored is not None
        done = run.wait_for_step(generation + 1, restored.step + 1)
        assert done is not None
        found.append(done.at - struck - 2 * step_seconds)
    assert run.process is not None
    run.process.terminate()
    run.process.wait()
    return found


def gaps(mtbf: float, seed: int) -> Iterator[float]:
    """Seconds between kills, exponential with this mean."""
    chance = random.Random(seed)
    while True:
        for stratum in chance.sample(range(_STRATA), _STRATA):
            yield -mtbf * math.log1p(-(stratum + chance.random()) / _STRATA)


def injured(folder: Path, steps: int, mtbf: float, interval: int, seed: int) -> tuple[float, int]:
    """Seconds from the first step to the last of a run whose processes are killed at random; and how many kills."""
    run = Run(folder, f"injured-{seed}", steps, interval)
    run.prepare()
    run.start()
    chance, until, kills = random.Random(seed), gaps(mtbf, seed), 0
    first = run.wait_for_step(1)
    assert first is not None
    last = first
    strike = time.monotonic() + next(until)
    while run.running():
        generation = run.generation()
        last = run.place(generation, 0) or last
        if time.monotonic() >= strike:
            strike += next(until)
            kills += kill_any(run, chance)
        time.sleep(_POLL_SECONDS)
    return last.at - first.at, kills


def kill_any(run: Run, chance: random.Random) -> int:
    """Kill one of the supervisor's children, whatever it is doing."""
    assert run.process is not None
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    if not children:
        return 0
    os.kill(int(chance.choice(children)), signal.SIGKILL)
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtbf", type=float, default=40.0, help="mean seconds between kills")
    parser.add_argument("--kills", type=int, default=12, help="about how many strike a run")
    parser.add_argument("--interval", type=int, default=20, help="steps between copies to memory")
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()

    from anychip.plan.goodput import Reliability, seconds_per_useful

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = calm(folder, 600, arguments.interval)
        back = recoveries(folder, 8, step, arguments.interval)
        held = Reliability(
            failures_per_s=1 / arguments.mtbf,
            back_s=statistics.mean(back),
            load_memory_s=0.0,
            load_storage_s=0.0,
            survives=1.0,
            stall_memory_s=0.0,
            stall_storage_s=0.0,
            write_s=0.0,
            waiting=0.0,
            stragglers=1.0,
        )
        factor = seconds_per_useful(held, np.array([arguments.interval * step]), np.array([1.0]))[0]
        steps = round(arguments.kills * arguments.mtbf / float(factor) / step)
        expected = steps * step * float(factor)
        print(f"step {step * 1e3:.1f} ms, back after {held.back_s:.2f} s ({min(back):.2f} to {max(back):.2f})")
        print("| run | kills | seconds | expected | measured / expected | useful share |\n|---|---|---|---|---|---|")
        for seed in range(arguments.runs):
            seconds, kills = injured(folder, steps, arguments.mtbf, arguments.interval, seed)
            useful = steps * step / seconds
            print(
                f"| {seed} | {kills} | {seconds:.0f} | {expected:.0f} | {seconds / expected:.3f} | {useful:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
