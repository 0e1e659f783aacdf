"""How long a job's processes take to find each other, and what that becomes at 8,192 and 16,384.

Light processes, forked from one that has imported torch, meet in one TCPStore; agents meet as threads. Each term is
timed from the common start to the last one's end, fitted to a straight line or a parabola, whichever is closer, and
extrapolated. The table of groups is measured at full size: a fake process group needs no other processes.

    python benchmarks/rendezvous.py --most 512
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the back end `fake`

TIMEOUT = timedelta(seconds=60)
HOST = "127.0.0.1"
NEIGHBOURS = 8  # processes of a tensor-parallel group
PROCESSES_A_NODE = 8
TARGETS = (8192, 16384)
Phase = Callable[[dict[str, dist.Store], int, int, int], None]


def connect(kept: dict[str, dist.Store], rank: int, count: int, port: int) -> None:
    """Every process opens its connection to the store."""
    kept["store"] = dist.TCPStore(HOST, port, is_master=False, timeout=TIMEOUT)


def barrier(kept: dict[str, dist.Store], rank: int, count: int, port: int) -> None:
    """Every process says that it is here; the last one lets all go."""
    store = kept["store"]
    if store.add("here", 1) == count:
        store.set("all here", "")
    store.wait(["all here"])


def small_groups(kept: dict[str, dist.Store], rank: int, count: int, port: int) -> None:
    """Every process writes its address and reads those of its group."""
    store = kept["store"]
    store.set(f"address{rank}", "x" * 64)
    first = rank // NEIGHBOURS * NEIGHBOURS
    for other in range(first, min(first + NEIGHBOURS, count)):
        store.get(f"address{other}")


def one_group(kept: dict[str, dist.Store], rank: int, count: int, port: int) -> None:
    """Every process reads the addresses of all others, as libraries that connect all with all do."""
    for other in range(count):
        kept["store"].get(f"address{other}")


def gloo(kept: dict[str, dist.Store], rank: int, count: int, port: int) -> None:
    """init_process_group with gloo, which connects every process with every other, and one all-reduce."""
    dist.init_process_group("gloo", store=kept["store"], rank=rank, world_size=count, timeout=TIMEOUT)
    dist.all_reduce(torch.ones(1))


def lazy_gloo(kept: dict[str, dist.Store], rank: int, count: int, port: int) -> None:
    """The same with connections made when first used."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    gloo(kept, rank, count, port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def crowd(count: int, phases: list[Phase]) -> list[float]:
    """Seconds of each phase over `count` processes. The store has a process of its own."""
    port = free_port()
    gates = [os.pipe() for _ in phases]  # one a phase: a fast process must not take a slow one's start
    done_read, done_write = os.pipe()
    server = _fork(lambda: _serve(port))
    children = [
        _fork(partial(_take_part, rank, count, port, phases, [start for start, _ in gates], done_write))
        for rank in range(count)
    ]
    seconds = []
    try:
        _read_exactly(done_read, count)  # all are waiting for the first phase
        for _, gate in gates:
            started = time.perf_counter()
            os.write(gate, b"." * count)
            _read_exactly(done_read, count)
            seconds.append(time.perf_counter() - started)
    finally:
        for child in (*children, server):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for end in (*(end for gate in gates for end in gate), done_read, done_write):
            os.close(end)
    return seconds


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def _serve(port: int) -> None:
    store = dist.TCPStore(HOST, port, is_master=True, wait_for_workers=False)
    while store:
        time.sleep(60)


def _take_part(rank: int, count: int, port: int, phases: list[Phase], gates: list[int], done: int) -> None:
    kept: dict[str, dist.Store] = {}
    os.write(done, b".")
    for phase, gate in zip(phases, gates, strict=True):
        os.read(gate, 1)
        phase(kept, rank, count, port)
        os.write(done, b".")
    time.sleep(60)


def _read_exactly(pipe: int, count: int) -> None:
    while count:
        count -= len(os.read(pipe, count))


def agents(count: int, backend: str) -> float:
    """Seconds until `count` nodes' agents, threads here, know each other."""
    port, barrier_ = free_port(), threading.Barrier(count + 1)
    conf = {"timeout": 100, "join_timeout": 100, "read_timeout": 100}

    def agent(rank: int) -> object:
        own = {"is_host": rank == 0} if backend == "c10d" else {"rank": rank}
        parameters = RendezvousParameters(backend, f"{HOST}:{port}", "job", count, count, None, **conf, **own)
        barrier_.wait()
        handler = get_rendezvous_handler(parameters)
        return handler, handler.next_rendezvous()

    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(agent, rank) for rank in range(count)]
        barrier_.wait()
        started = time.perf_counter()
        held = [future.result(timeout=100) for future in waiting]
        seconds = time.perf_counter() - started
    del held
    return seconds


def mesh_seconds(world_size: int) -> float:
    """Seconds in one process to create the groups of a layout of 8 stages and 8-fold tensor parallelism."""
    dist.init_process_group("fake", rank=world_size // 2, world_size=world_size, store=FakeStore())
    started = time.perf_counter()
    init_device_mesh("cpu", (8, world_size // 64, 8), mesh_dim_names=("pipeline", "shard", "tensor"))
    seconds = time.perf_counter() - started
    dist.destroy_process_group()
    return seconds


def fit(counts: list[int], seconds: list[float]) -> tuple[str, Callable[[float], float], float]:
    """The closest of a, a + b n and a + b n^2 with a, b >= 0: its name, itself, and its largest relative error."""
    t = np.array(seconds)
    best: tuple[str, Callable[[float], float], float] | None = None
    for name, power in (("constant", 0), ("linear", 1), ("quadratic", 2)):
        growth = np.array(counts, float) ** power
        (a, b), *_ = np.linalg.lstsq(np.stack([np.ones_like(t), growth], 1) / t[:, None], np.ones_like(t), rcond=None)
        if a < 0 or b < 0:  # through the origin
            a, b = 0.0, float(np.sum(growth / t) / np.sum((growth / t) ** 2))
        error = float(np.max(np.abs((a + b * growth) / t - 1)))
        if best is None or error < best[2]:
            best = (name, partial(_curve, float(a), float(b), power), error)
    assert best is not None
    return best


def _curve(a: float, b: float, power: int, count: float) -> float:
    return a + b * count**power


def show(title: str, counts: list[int], seconds: list[float], targets: tuple[int, ...]) -> None:
    name, curve, error = fit(counts, seconds)
    measured = ", ".join(f"{count}: {value:.3g}" for count, value in zip(counts, seconds, strict=True))
    far = " | ".join(f"{curve(target):,.1f}" for target in targets)
    print(f"| {title} | {measured} | {name}, {error:.0%} | {far} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=512, help="processes at most")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the median counts")
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, median of {given.rounds}; seconds\n")

    print(f"| term | measured | growth, largest error | {TARGETS[0]:,} | {TARGETS[1]:,} |\n|---|---|---|---|---|")
    counts = [count for count in (64, 128, 256, 512, 1024) if count <= given.most]
    phases = [connect, barrier, small_groups, one_group]
    rounds = {n: np.median([crowd(n, phases) for _ in range(given.rounds)], axis=0) for n in counts}
    for number, phase in enumerate(phases):
        show(phase.__name__, counts, [float(rounds[n][number]) for n in counts], TARGETS)
    small = [count for count in (16, 32, 64, 128) if count <= given.most]
    for group in (gloo, lazy_gloo):
        full = [float(np.median([crowd(n, [connect, group])[1] for _ in range(given.rounds)])) for n in small]
        show(group.__name__, small, full, TARGETS)

    nodes = tuple(target // PROCESSES_A_NODE for target in TARGETS)
    for backend in ("anychip", "c10d"):
        few = [count for count in (16, 32, 64, 96) if count <= given.most]
        taken = [float(np.median([agents(n, backend) for _ in range(given.rounds)])) for n in few]
        show(f"agents, {backend}", few, taken, nodes)

    exact = [mesh_seconds(size) for size in TARGETS]
    print(f"| groups of a mesh | at full size | | {exact[0]:.1f} | {exact[1]:.1f} |")


if __name__ == "__main__":
    main()
