"""What watching costs, beside the step it belongs to: comparing copies, heartbeats, listening to collectives, judging.

Prints a Markdown table of medians. Run it on an idle machine.

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
from training import SHAPES, anychip_step, model_config

from anychip.train.heartbeat import PHASES, Heartbeat


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def step_of_beats(heartbeat: Heartbeat) -> None:
    heartbeat.begin_step(1)
    for phase in PHASES[1:]:
        heartbeat.beat(phase)


def listening_seconds(heartbeat: Heartbeat, calls: int = 2000) -> float:
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

    plain = median_seconds(talk, 9)
    dist.ProcessGroup, dist.Work = Group, Work  # so that they are heard
    with heartbeat.listening("one process"):
        heard = median_seconds(lambda: (heartbeat.begin_step(1), talk()), 9)
    return (heard - plain) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--interval", type=int, default=10, help="steps between comparisons")
    parser.add_argument("--collectives", type=int, default=30, help="of a step: FSDP2 makes three a layer")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.recipe.schema import GuardConfig, OptimizerConfig
    from anychip.train.copies import digest
    from anychip.train.guard import Guard
    from anychip.train.optimizer import Optimizer

    torch.set_num_threads(os.cpu_count() or 1)
    shape = SHAPES[arguments.shape]
    step = median_seconds(anychip_step(shape, "fp32", False), arguments.rounds)
    config = model_config(shape)
    model = Decoder(config)
    init_parameters(model, config, 0)
    parameters = dict(model.named_parameters())
    state = [*parameters.values(), *Optimizer(parameters, OptimizerConfig(), torch.float32).state().values()]
    digests = median_seconds(lambda: torch.stack([digest(tensor) for tensor in state]), arguments.rounds)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        heartbeat = Heartbeat(Path(folder), 0)
        beats = median_seconds(lambda: step_of_beats(heartbeat), 200)
        listening = listening_seconds(heartbeat) * arguments.collectives
        heartbeat.close()
    guard = Guard(GuardConfig(explosion=5.0))
    judging = median_seconds(lambda: guard.judge(1.0, 1.0), 200)
    gigabytes = sum(tensor.nbytes for tensor in state) / 1e9
    print(f"{arguments.shape}: a step takes {step:.2f} s; weights and optimizer state {gigabytes:.2f} GB\n")
    print("| what | seconds | share of training |\n|---|---|---|")
    rows = [
        (f"digests of all state, every {arguments.interval} steps", digests, digests / arguments.interval),
        ("heartbeats of a step and its own time", beats, beats),
        (f"listening to {arguments.collectives} collectives of a step", listening, listening),
        ("judging a step", judging, judging),
    ]
    for what, seconds, a_step in rows:
        print(f"| {what} | {seconds:.6f} | {a_step / step:.4%} |")


if __name__ == "__main__":
    main()
