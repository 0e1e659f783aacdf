"""What watching costs, beside the step it belongs to: comparing copies, replays, heartbeats, listening, judging.

Prints Markdown tables of medians; steps with and without a replay alternate. A step here is one micro-batch, which is
when a replay costs most: of a step of n micro-batches it is the n-th part. Run it on an idle machine, or with --busy,
which takes one thread and its CPU time.

    python benchmarks/guard.py --interval 10
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from one_step import prepare
from training import SHAPES, Shape

from anychip.train.heartbeat import PHASES, Heartbeat

Clock = Callable[[], float]
REPLAY_INTERVALS = (10, 50, 100, 200, 500, 1000)


def alternate(clock: Clock, rounds: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each, taken in turns; the first round warms up."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, kept in zip(works, seconds, strict=True):
            started = clock()
            work()
            kept.append(clock() - started)
    return [kept[1:] for kept in seconds]


def median_seconds(clock: Clock, rounds: int, work: Callable[[], object]) -> float:
    return statistics.median(alternate(clock, rounds, work)[0])


def steps_of(shape: Shape, dtype_name: str):
    """A whole step of one micro-batch by anychip, with a replay or without; the state that digests read; and a sketch
    of as many numbers as there are gradients, of which a replayed step makes one a micro-batch and two more."""
    from anychip.recipe.schema import GuardConfig
    from anychip.train.replay import Replay
    from anychip.train.step import Checks
    from anychip.train.sums import SumCheck

    parts = prepare("guard", shape, dtype_name)
    replay = Replay(GuardConfig(replay_interval=1), "", parts.engine, parts.processes)
    print(f"compute dtype {parts.engine.parts[0].compute_dtype}, {torch.get_num_threads()} threads", flush=True)

    def step(replayed: bool) -> None:
        checks = Checks(lambda batch: replay.forward_backward(1, batch)) if replayed else Checks()
        done = parts.step(3e-4, checks)
        assert not done.problem, done.problem

    state = [*parts.engine.parameters.values(), *parts.optimizer.state().values()]
    sums = SumCheck(parts.engine, parts.processes)

    def sketch() -> None:
        for parameter in parts.engine.trainable.values():
            sums.sketch(parameter.detach())

    return step, state, sketch


def step_of_beats(heartbeat: Heartbeat) -> None:
    heartbeat.begin_step(1)
    for phase in PHASES[1:]:
        heartbeat.beat(phase)


def listening_seconds(clock: Clock, heartbeat: Heartbeat, calls: int = 2000) -> float:
    """What is added to one collective that is begun and waited for: here by one process that sends nothing."""
    import torch.distributed as dist

    class Work:
        def wait(self) -> None: ...

    class Group:
        group_desc = "mesh_shard"

        def allreduce(self, tensors: list[torch.Tensor]) -> Work:
            return Work()

    tensor, group = [torch.ones(1)], Group()

    def talk() -> None:
        for _ in range(calls):
            group.allreduce(tensor).wait()

    plain = median_seconds(clock, 9, talk)
    dist.ProcessGroup, dist.Work = Group, Work  # so that they are heard
    with heartbeat.listening("one process"):
        heard = median_seconds(clock, 9, lambda: (heartbeat.begin_step(1), talk()))
    return (heard - plain) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--interval", type=int, default=10, help="steps between comparisons")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--collectives", type=int, default=30, help="of a step: FSDP2 makes three a layer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="the machine has other work: one thread, CPU time")
    arguments = parser.parse_args()

    from anychip.recipe.schema import GuardConfig
    from anychip.train.copies import digest
    from anychip.train.guard import Guard

    clock = time.process_time if arguments.busy else time.perf_counter
    torch.set_num_threads(1 if arguments.busy else os.cpu_count() or 1)
    shape = SHAPES[arguments.shape]
    make_step, state, sketch = steps_of(shape, arguments.dtype)
    plain, replayed = alternate(clock, arguments.rounds, lambda: make_step(False), lambda: make_step(True))
    step = statistics.median(plain)
    replay = statistics.median(b - a for a, b in zip(plain, replayed, strict=True))
    sketches = median_seconds(clock, 3 * arguments.rounds, sketch)
    digests = median_seconds(clock, arguments.rounds, lambda: torch.stack([digest(tensor) for tensor in state]))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        heartbeat = Heartbeat(Path(folder), 0)
        beats = median_seconds(clock, 200, lambda: step_of_beats(heartbeat))
        listening = listening_seconds(clock, heartbeat) * arguments.collectives
        heartbeat.close()
    guard = Guard(GuardConfig(explosion=5.0))
    judging = median_seconds(clock, 200, lambda: guard.judge(1.0, 1.0))
    gigabytes = sum(tensor.nbytes for tensor in state) / 1e9
    print(f"{arguments.shape}: a step takes {step:.2f} s; weights and optimizer state {gigabytes:.2f} GB\n")
    print("| what | seconds | share of training |\n|---|---|---|")
    rows = [
        (f"two digests of all state, every {arguments.interval} steps", 2 * digests, 2 * digests / arguments.interval),
        ("heartbeats of a step and its own time", beats, beats),
        (f"listening to {arguments.collectives} collectives of a step", listening, listening),
        ("judging a step", judging, judging),
    ]
    for what, seconds, a_step in rows:
        print(f"| {what} | {seconds:.6f} | {a_step / step:.4%} |")
    print(f"\nreplay of a micro-batch: {replay:.2f} s, {replay / step:.0%} of a step of one")
    print(f"of that, the check of its sum: {3 * sketches:.3f} s, {3 * sketches / step:.1%}\n")
    print(
        "| guard.replay_interval | share of training, 1 micro-batch a step | 8 micro-batches | 64 |\n|---|---|---|---|"
    )
    for interval in REPLAY_INTERVALS:
        shares = " | ".join(f"{replay / (n * step * interval):.3%}" for n in (1, 8, 64))
        print(f"| {interval} | {shares} |")


if __name__ == "__main__":
    main()
