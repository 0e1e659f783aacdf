"""The part of benchmarks/growth.py that grows a checkpoint on disk, beside a plain copy of the bytes it writes."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

COPY_BYTES = 8 << 20
FOLDERS = {"make": "old", "grow": "grown", "copy": "copied"}


def stream(arguments: argparse.Namespace) -> None:
    with TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        made = worker("make", folder, arguments)
        taken: dict[str, list[dict[str, float]]] = {"grow": [], "copy": []}
        for _ in range(arguments.rounds):
            taken["grow"].append(worker("grow", folder, arguments))
            taken["copy"].append(worker("copy", folder, arguments))
            for written in ("grown", "copied"):
                shutil.rmtree(folder / written)
    print(f"{made['bytes'] / 1e9:.3g} GB of checkpoint, {arguments.processes} processes, {arguments.rounds} rounds\n")
    print("| | written | seconds | GB/s written | peak memory, all processes |\n|---|---|---|---|---|")
    labels = {"grow": "growing, with digests, flushed", "copy": "plain copy of what it wrote, flushed"}
    for kind, rows in taken.items():
        seconds, size = statistics.median(row["seconds"] for row in rows), rows[0]["bytes"]
        memory, rate = max(row["memory"] for row in rows), size / seconds
        shown = f"{size / 1e9:.3g} GB | {seconds:.2f} | {rate / 1e9:.2f} | {memory / 1e9:.2f} GB"
        print(f"| {labels[kind]} | {shown} |")


def worker(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """A measurement in a process of its own: seconds, bytes written, peak memory."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("gigabytes", "hidden", "processes")]
    program = str(Path(__file__).with_name("growth.py"))
    command = [sys.executable, program, "stream", *options, "--worker", kind, "--folder", str(folder)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    return dict(json.loads(answer))


def work(arguments: argparse.Namespace) -> None:
    """What that process does."""
    folder, kind = Path(arguments.folder), arguments.worker
    if kind == "make":
        seconds = make(folder / "old", arguments.gigabytes, arguments.hidden)
    elif kind == "grow":
        seconds = grow(folder / "old", folder / "grown", arguments)
    else:
        seconds = copy(folder / "grown", folder / "copied")
    nbytes = sum(path.stat().st_size for path in (folder / FOLDERS[kind]).rglob("*") if path.is_file())
    workers = arguments.processes if kind == "grow" and arguments.processes > 1 else 0
    print(json.dumps({"seconds": seconds, "bytes": nbytes, "memory": peak_memory(workers)}))


def make(root: Path, gigabytes: float, hidden: int) -> float:
    import torch

    from anychip.model.arithmetic import parameter_shapes
    from anychip.train.checkpoint import CheckpointStore

    started = time.perf_counter()
    block = torch.rand(1 << 20)
    state = {}
    for name, shape in parameter_shapes(stream_model(gigabytes, hidden)):
        count = math.prod(shape)
        for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            state[f"{kind}.{name}"] = block.repeat(-(-count // len(block)))[:count].view(shape)
        state[f"optimizer.step.{name}"] = torch.tensor(1.0)
    CheckpointStore(root).save(1, state, {})
    return time.perf_counter() - started


def grow(source: Path, target: Path, arguments: argparse.Namespace) -> float:
    """Twice as wide. Reading and verifying the source whole, as opening it does, is not timed: a copy does neither."""
    from anychip.grow.plan import plan_growth
    from anychip.grow.stream import Stream, grow_checkpoint
    from anychip.recipe.schema import GrowthConfig
    from anychip.train.checkpoint import CheckpointStore

    old = stream_model(arguments.gigabytes, arguments.hidden)
    doubled = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    to = {name: 2 * getattr(old, name) for name in doubled}
    plan = plan_growth(old, GrowthConfig.model_validate({"at_tokens": 1, "to": to}), 0)
    info = CheckpointStore(source).open(1)
    started = time.perf_counter()
    grow_checkpoint(Stream(info, plan, target, {}), processes=arguments.processes, prove_it=False)
    return time.perf_counter() - started


def copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reading, place.open("wb") as writing:
            shutil.copyfileobj(reading, writing, COPY_BYTES)
            writing.flush()
            os.fdatasync(writing.fileno())
    return time.perf_counter() - started


def stream_model(gigabytes: float, hidden: int) -> Any:
    """As many layers as the checkpoint has room for, one at least."""
    from anychip.grow.estimate import state_bytes
    from anychip.recipe import ModelConfig

    def model(layers: int) -> ModelConfig:
        heads = max(1, hidden // 128)
        return ModelConfig(
            vocab_size=8192,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )

    one, two = (state_bytes(model(layers), "adamw") for layers in (1, 2))
    return model(max(1, 1 + round((gigabytes * 1e9 - one) / (two - one))))


def peak_memory(workers: int) -> float:
    """Bytes: of this process, and of its largest worker times their number."""
    status = Path("/proc/self/status").read_text()
    mine = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return (mine + workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024
