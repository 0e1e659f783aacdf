"""What copies in the memory of hosts cost, and how long training takes to go on from them.

    python benchmarks/memory_copies.py cost --shape small --hosts 2
    python benchmarks/memory_copies.py recovery --shape small

Hosts are processes of this machine with a folder each for memory. `cost` takes steps and copies in turn: how long a
copy stops training, what it takes in CPU seconds (where the CPU is also what trains, as here, that is training time
lost; beside an accelerator only the stop is), and the interval at which either is 1 % of training. `recovery` trains on
2 hosts of 2 processes until all are killed, empties the memory of one host, leaves no checkpoint on disk, starts again,
and prints what the next step came after.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SHARE = 0.01


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that pass, and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def cost(arguments: argparse.Namespace) -> None:
    """One host: prints a line of JSON."""
    import torch
    import torch.distributed as dist
    from contestants import anychip_step
    from torch import Tensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from training import SHAPES, model_config

    from anychip.model.arithmetic import parameter_shapes
    from anychip.train.memory import MemoryCopies

    hosts = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // hosts))
    shape = SHAPES[arguments.shape]
    step = anychip_step(model_config(shape), shape.batch // hosts, shape.seq, "fp32", False)
    group = None
    if hosts > 1:
        dist.init_process_group("gloo")
        group = dist.new_group(backend="gloo")

    def part(size: tuple[int, ...]) -> Tensor:
        whole = torch.randn(size)
        return distribute_tensor(whole, init_device_mesh("cpu", (hosts,)), [Shard(0)]) if hosts > 1 else whole

    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    sizes = list(parameter_shapes(model_config(shape)))
    state = {f"{kind}.{name}": part(tuple(size)) for kind in kinds for name, size in sizes}
    copies = MemoryCopies(Path(arguments.folder), arguments.peers, group)
    copies.prepare(state)
    stalls, rows = [], {"step": [timed(step)], "copy": []}
    for number in range(arguments.rounds):
        rows["step"].append(timed(step))
        rows["copy"].append(timed(lambda: (copies.save_async(3 * number + 1, state, {}), copies.wait())))  # noqa: B023
        stalls.append(timed(lambda: copies.save_async(3 * number + 2, state, {}))[0])  # noqa: B023
        copies.wait()
    nbytes = sum(path.stat().st_size for path in Path(os.environ["ANYCHIP_MEMORY_FOLDER"]).rglob("*.safetensors"))
    copies.remove()
    medians = {kind: [statistics.median(column) for column in zip(*row, strict=True)] for kind, row in rows.items()}
    print(json.dumps({"stall": statistics.median(stalls), "bytes": nbytes, **medians}), flush=True)


def train(arguments: argparse.Namespace) -> None:
    """One of four processes: prints when it was started, when its program was there, and when each step was done."""
    import torch
    from training import SHAPES, model_config

    from anychip.data.batch import Batch
    from anychip.parallel.parts import initialize_parts
    from anychip.recipe.schema import CheckpointConfig, LogConfig, OptimizerConfig, ParallelConfig
    from anychip.train import loop
    from anychip.train.job import TrainingJob

    loaded, shape = time.time(), SHAPES[arguments.shape]
    torch.set_num_threads(1)

    read: list[int] = []

    class Tokens:
        def batch(self, step: int) -> Batch:
            read.append(step)
            tokens = torch.randint(0, shape.vocab, (4, 129), generator=torch.Generator().manual_seed(step))
            return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

        def documents(self, step: int) -> list[str]:
            return []

    inner = loop.train_step

    def told(*given: object, **more: object) -> object:
        done = inner(*given, **more)  # type: ignore[arg-type]
        print(json.dumps({"loaded": loaded, "done": time.time(), "first": read[0]}), flush=True)
        return done

    loop.train_step = told  # type: ignore[assignment]
    loop.run_training(
        TrainingJob(
            title="recovery",
            directory=Path(arguments.folder),
            model=model_config(shape),
            source=Tokens(),
            initialize=lambda parameters: initialize_parts(parameters, model_config(shape), 0),
            evaluate=None,
            identity="recovery",
            steps=10**6,
            seq_length=128,
            micro_batch_size=1,
            global_batch_size=4,
            parallel=ParallelConfig(),
            optimizer=OptimizerConfig(),
            checkpoint=CheckpointConfig(save_interval=0, memory_interval=2),
            log=LogConfig(interval=10**6, tensorboard=False),
            compute_dtype="fp32",
        )
    )


def start(verb: str, arguments: argparse.Namespace, layout: list[int], folder: Path) -> list[subprocess.Popen[str]]:
    """Processes of emulated hosts, that many on each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "run").mkdir(exist_ok=True)
    started = []
    for rank, host in enumerate(host for host, count in enumerate(layout) for _ in range(count)):
        memory = folder / f"memory-{host}"
        memory.mkdir(exist_ok=True)
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(sum(layout)),
            "LOCAL_WORLD_SIZE": str(layout[host]),
            "GROUP_RANK": str(host),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ANYCHIP_MEMORY_FOLDER": str(memory),
        }
        command = [sys.executable, __file__, verb, "--worker", "--folder", str(folder / "run")]
        command += ["--shape", arguments.shape, "--rounds", str(arguments.rounds), "--peers", str(arguments.peers)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    return started


def next_line(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise SystemExit("a process ended early")


def report_cost(arguments: argparse.Namespace, folder: Path) -> None:
    processes = start("cost", arguments, [1] * arguments.hosts, folder)
    rows = [next_line(process) for process in processes]
    for process in processes:
        process.wait()
    worst = {key: max(row[key] for row in rows) for key in ("stall", "bytes")}
    step, copy = ([max(row[kind][at] for row in rows) for at in (0, 1)] for kind in ("step", "copy"))
    moved = worst["bytes"] / 2 if arguments.hosts > 1 and arguments.peers else 0
    print(f"{arguments.shape}, {arguments.hosts} host(s): medians of {arguments.rounds} rounds, of the slower host\n")
    print(f"a host holds {worst['bytes'] / 1e6:,.0f} MB of a copy and sends {moved / 1e6:,.0f} MB of it")
    print(f"a step takes            {step[0]:7.3f} s, {step[1]:7.3f} CPU s")
    every = worst["stall"] / step[0] / SHARE, copy[1] / step[1] / SHARE
    print(f"a copy stops training   {worst['stall']:7.3f} s: 1 % every {every[0]:.0f} steps")
    print(f"a copy takes in all     {copy[0]:7.3f} s, {copy[1]:7.3f} CPU s: 1 % every {every[1]:.0f} steps")


def report_recovery(arguments: argparse.Namespace, folder: Path) -> None:
    processes = start("recovery", arguments, [2, 2], folder)
    for _ in range(9):
        next_line(processes[0])
    for process in processes:
        process.send_signal(signal.SIGKILL)
    killed = time.time()
    for process in processes:
        process.wait()
    shutil.rmtree(folder / "memory-1")
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    processes = start("recovery", arguments, [2, 2], folder)
    first = [next_line(process) for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    if not first[0]["first"]:
        raise SystemExit("no copy was found: training began anew")
    loaded, done = (max(row[key] for row in first) for key in ("loaded", "done"))
    print(f"{arguments.shape}, 2 hosts of 2 processes, the memory of one lost, no checkpoint on disk")
    print(f"from the kill until all programs were loaded {loaded - killed:.1f} s")
    print(f"from then to the end of the next step        {done - loaded:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "recovery"))
    parser.add_argument("--shape", choices=("small", "medium"), default="small")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        (cost if arguments.what == "cost" else train)(arguments)
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="copies-benchmark-"))
    try:
        (report_cost if arguments.what == "cost" else report_recovery)(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
