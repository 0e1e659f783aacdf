"""One of several processes of a probe: `python -m anychip.verify.probe.worker JOB` with RANK and WORLD_SIZE set.

It tries each collective of the layout with each dtype, and computes some cases again: every process must get the bits
that the probe itself got. What it found goes to a file beside JOB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from anychip.files import write_json

_SECONDS = 400  # far more than it takes, also on a machine that others load
_ELEMENTS = 1003


@dataclass(frozen=True)
class ProcessJob:
    """What all processes are told. `groups`: name of an axis -> the groups of ranks that it makes."""

    shapes: dict[str, Any]
    dtypes: list[str]
    groups: dict[str, list[list[int]]]
    pipeline: bool
    threads: int
    digests: dict[str, str]

    @property
    def world_size(self) -> int:
        return 1 + max(rank for groups in self.groups.values() for group in groups for rank in group)


def run_processes(job: ProcessJob, folder: Path) -> list[dict[str, Any]]:
    """Start the processes, one a device; their findings as JSON. A process that ends badly or hangs is a finding."""
    path = folder / "processes.json"
    write_json(path, asdict(job))
    for rank in range(job.world_size):
        _result(path, rank).unlink(missing_ok=True)
    store = folder / "processes.store"
    store.unlink(missing_ok=True)
    ranks = [_start(path, rank, job.world_size) for rank in range(job.world_size)]
    deadline = time.monotonic() + _SECONDS
    found: list[dict[str, Any]] = []
    try:
        for rank, process in enumerate(ranks):
            try:
                _, said = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                found.append(_failed(rank, f"does not end within {_SECONDS} seconds"))
                continue
            if process.returncode != 0 or not _result(path, rank).is_file():
                last = (said.strip().splitlines() or [f"code {process.returncode}"])[-1]
                found.append(_failed(rank, f"fails: {last[:300]}"))
            else:
                found += json.loads(_result(path, rank).read_text(encoding="utf-8"))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        store.unlink(missing_ok=True)
    return _once(found)


def _start(path: Path, rank: int, world_size: int) -> subprocess.Popen[str]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    command = [sys.executable, "-m", "anychip.verify.probe.worker", str(path)]
    return subprocess.Popen(
        command, env={**os.environ, **own}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _result(path: Path, rank: int) -> Path:
    return path.with_name(f"process-{rank}.json")


def _failed(rank: int, kind: str) -> dict[str, Any]:
    return {"operator": "process", "version": "", "what": "rank", "case": f"rank {rank}", "kind": kind}


def _once(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several ranks that found the same count once."""
    keys = [(f["operator"], f["what"], f["case"], f["kind"].partition(":")[0]) for f in found]
    return list(dict(zip(reversed(keys), reversed(found), strict=True)).values())


def _main(path: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    from anychip.chips.backend import detect_backend
    from anychip.chips.operators.registry import overrides_of
    from anychip.parallel.processes import group_backends
    from anychip.verify.probe.measure import Finding, bits
    from anychip.verify.probe.run import cases_of
    from anychip.verify.probe.shapes import Shapes

    job = ProcessJob(**json.loads(path.read_text(encoding="utf-8")))
    rank = int(os.environ["RANK"])
    torch.set_num_threads(job.threads)
    backend = detect_backend()
    backend.prepare_process()
    device = backend.device(rank)
    store = FileStore(str(path.with_name("processes.store")), job.world_size)
    dist.init_process_group(
        group_backends(device, backend.collective_backend),
        store=store,
        rank=rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=_SECONDS),
    )
    dtypes = [getattr(torch, name) for name in job.dtypes]
    found = list(_collectives(job, device, dtypes))
    overrides = overrides_of(backend.vendor)
    for version, case in cases_of(Shapes(**job.shapes), dtypes, overrides, muon=False):
        expected = job.digests.get(f"{version} {case.name}")
        if expected and bits(case, version, device, overrides) != expected:
            found.append(Finding(case.operator, version, "result", case.name, OTHER_BITS))
    write_json(_result(path, rank), [finding.as_json() for finding in found])
    dist.barrier()
    dist.destroy_process_group()


OTHER_BITS = "gives other bits in another process"


def _collectives(job: ProcessJob, device: Any, dtypes: list[Any]) -> Iterator[Any]:
    """Findings of this rank. Every rank makes everyone's inputs, so that it knows what should come out."""
    import torch
    import torch.distributed as dist

    from anychip.chips.operators.trial import Draw
    from anychip.verify.probe.judge import flaw, limits
    from anychip.verify.probe.measure import NOT_REPEATABLE, Finding

    rank = dist.get_rank()
    for axis, groups in job.groups.items():
        made = [(ranks, dist.new_group(ranks)) for ranks in groups]
        ranks, group = next((ranks, group) for ranks, group in made if rank in ranks)
        for dtype in [*dtypes, torch.int64]:
            draw = Draw()
            if dtype == torch.int64:
                parts = [draw.integers(2**40, len(ranks) * _ELEMENTS) for _ in ranks]
            else:
                parts = [draw.normal(len(ranks) * _ELEMENTS, dtype=dtype) for _ in ranks]
            for operation, exact, run in _operations(parts, ranks.index(rank), group, job.pipeline):
                case = f"{operation} of {str(dtype).removeprefix('torch.')} over {axis} ({len(ranks)} processes)"
                if dtype == torch.int64 and "sum" in operation:
                    continue
                results = [run(parts[ranks.index(rank)].to(device, copy=True)).cpu() for _ in range(2)]
                name = operation.partition(" ")[0]
                if dtype == torch.int64:
                    wrong = None if torch.equal(results[0], exact) else "is wrong"
                    if wrong:
                        yield Finding(name, "", "result", case, wrong)
                    continue
                allowed = limits(dtype, len(ranks), float(len(ranks)) if "sum" in operation else 0.0)
                found = flaw(results[0], exact, allowed)
                if found is not None:
                    yield Finding(name, "", "result", case, found.kind, found.measured, found.limit)
                elif not torch.equal(*results):
                    yield Finding(name, "", "result", case, NOT_REPEATABLE)


def _operations(parts: list[Any], place: int, group: Any, pipeline: bool) -> Iterator[tuple[str, Any, Any]]:
    """Name, what should come out here, and how to call it, of every collective that layouts are made of."""
    import torch
    import torch.distributed as dist

    from anychip.parallel.collectives import gather, scatter_sum

    everyone = torch.stack([part.double() if part.is_floating_point() else part for part in parts])
    total, count = everyone.sum(0), len(parts)

    def reduced(x: Any, operation: Any) -> Any:
        dist.all_reduce(x, op=operation, group=group)
        return x

    yield "all_reduce sum", total, lambda x: reduced(x, dist.ReduceOp.SUM)
    yield "all_reduce max", everyone.amax(0), lambda x: reduced(x, dist.ReduceOp.MAX)
    yield "reduce_scatter sum", total.chunk(count)[place], lambda x: scatter_sum(x, 0, group)
    yield "all_gather", everyone.flatten(), lambda x: gather(x, 0, group)

    def broadcast(x: Any) -> Any:
        dist.broadcast(x, group_src=0, group=group)
        return x

    yield "broadcast", everyone[0], broadcast

    def passed_on(x: Any) -> Any:
        """Around the ring, as stages of a pipeline do."""
        got = torch.empty_like(x)
        after, before = (place + 1) % count, (place - 1) % count
        if place % 2 == 0:
            dist.send(x, group=group, group_dst=after)
            dist.recv(got, group=group, group_src=before)
        else:
            dist.recv(got, group=group, group_src=before)
            dist.send(x, group=group, group_dst=after)
        return got

    if pipeline:
        yield "send and receive", everyone[place - 1], passed_on


def groups_of(degrees: Mapping[str, int], devices: int) -> dict[str, list[list[int]]]:
    """The groups that a layout makes, of as few processes as show each kind: 2 for one axis, 4 for more."""
    axes = [axis for axis, degree in degrees.items() if degree > 1] or ["replicate"]
    if devices < 2:
        return {}
    if len(axes) == 1 or devices < 4:
        return {" and ".join(axes): [[0, 1]]}
    inner, outer = axes[-1], " and ".join(axes[:-1])
    return {inner: [[0, 1], [2, 3]], outer: [[0, 2], [1, 3]], "everyone": [[0, 1, 2, 3]]}


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
