"""How long training stands still for a checkpoint, and what writing it in the background costs.

    python benchmarks/checkpoint_stall.py [--gigabytes 1] [--rounds 5] [--folder DIR] [--json FILE]

Each round measures, one after the other: raw writing of the same bytes (8 MiB blocks, then fsync), a synchronous save,
and an asynchronous save during which a small decoder trains. The table gives medians over rounds; the bar is an
asynchronous stall of at most 10 % of the synchronous save.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from anychip.train.checkpoint import CheckpointStore

BAR = 0.10
_BLOCK = 8 << 20


def make_state(gigabytes: float) -> dict[str, Tensor]:
    """Weights and both AdamW moments of a decoder of 1024 hidden units, as many layers as fit."""
    shapes = {"attention": (1024, 1024), "mlp": (1024, 2816), "norm": (1024,)}
    layer = sum(torch.Size(shape).numel() for shape in shapes.values()) * 4 * 3
    groups = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    return {
        f"{group}.layers.{number}.{name}.weight": torch.randn(shape)
        for number in range(max(1, round(gigabytes * 1e9 / layer)))
        for group in groups
        for name, shape in shapes.items()
    }


def make_step() -> Callable[[], None]:
    """A training step that keeps all cores busy for some tens of milliseconds."""
    model = torch.nn.Sequential(*(torch.nn.Linear(768, 768) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = torch.randn(512, 768)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def raw_write(folder: Path, nbytes: int) -> float:
    """Seconds to write and flush `nbytes` with plain system calls."""
    block, path = os.urandom(_BLOCK), folder / "raw"
    started = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _ in range(-(-nbytes // _BLOCK)):
        os.write(descriptor, block)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def steps_per_second(step: Callable[[], None], until: Callable[[], bool]) -> float:
    """Training speed while `until` is false."""
    started, count = time.perf_counter(), 0
    while not until():
        step()
        count += 1
    return count / (time.perf_counter() - started)


def _passed(end: float) -> bool:
    return time.perf_counter() > end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="disk to measure; default: the temporary folder")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers here")
    arguments = parser.parse_args()

    state, step = make_state(arguments.gigabytes), make_step()
    nbytes = sum(tensor.nbytes for tensor in state.values())
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-stall-", dir=arguments.folder))
    rows: dict[str, list[float]] = {name: [] for name in ("raw", "sync", "cpu", "stall", "async", "quiet", "busy")}
    try:
        store = CheckpointStore(folder / "checkpoints", keep=1)
        started = time.perf_counter()
        store.prepare(state)
        prepare = time.perf_counter() - started
        for number in range(arguments.rounds):
            rows["raw"].append(raw_write(folder, nbytes))
            cpu = time.process_time()
            rows["sync"].append(store.save(2 * number, state, {}).seconds)
            rows["cpu"].append(time.process_time() - cpu)
            end = time.perf_counter() + 3
            rows["quiet"].append(steps_per_second(step, partial(_passed, end)))
            started = time.perf_counter()
            store.save_async(2 * number + 1, state, {})
            rows["stall"].append(time.perf_counter() - started)
            rows["busy"].append(steps_per_second(step, lambda: not store.in_flight))
            report = store.wait()
            assert report
            rows["async"].append(report.seconds)
            print({name: round(values[-1], 3) for name, values in rows.items()}, flush=True)
    finally:
        shutil.rmtree(folder)

    median = {name: statistics.median(values) for name, values in rows.items()}
    share = median["stall"] / median["sync"]
    speed = statistics.median(busy / quiet for busy, quiet in zip(rows["busy"], rows["quiet"], strict=True))
    result = {
        "bytes": nbytes,
        "tensors": len(state),
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "raw_write_mb_s": nbytes / 1e6 / median["raw"],
        "sync_save_s": median["sync"],
        "sync_save_mb_s": nbytes / 1e6 / median["sync"],
        "sync_share_of_raw": median["raw"] / median["sync"],
        "async_stall_s": median["stall"],
        "async_stall_share": share,
        "async_total_s": median["async"],
        "prepare_once_s": prepare,
        "training_speed_while_writing": speed,
        "save_cpu_s": median["cpu"],
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    print(f"\n{nbytes / 1e9:.2f} GB in {len(state)} tensors, medians of {arguments.rounds} rounds")
    print(f"raw write + fsync        {median['raw']:7.2f} s  {result['raw_write_mb_s']:7.0f} MB/s")
    print(f"synchronous save         {median['sync']:7.2f} s  {result['sync_save_mb_s']:7.0f} MB/s")
    print(f"asynchronous, in all     {median['async']:7.2f} s")
    print(f"asynchronous, stall      {median['stall']:7.3f} s  {share:.1%} of synchronous (bar {BAR:.0%})")
    print(
        f"training while writing   {speed:7.0%}    of its speed otherwise; a save takes {median['cpu']:.1f} CPU seconds"
    )
    print(f"memory set aside once in {prepare:7.2f} s, peak memory {result['peak_memory_gb']:.2f} GB")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
