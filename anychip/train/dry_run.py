"""One rank of a job of any size on one machine: the real mesh, parts, stage, optimizer and step, with nothing in them.

Tensors are fake (shapes and types only) and so is the process group (it answers at once), so what is built is what the
rank would build, and what is counted is what it would hold and send.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _PipelineSchedule

from anychip.data.batch import Batch
from anychip.errors import InputError
from anychip.model.decoder import Decoder
from anychip.parallel.data import READING_AXES
from anychip.parallel.gradients import gradient_norm
from anychip.parallel.layout import AXES, resolve_layout
from anychip.parallel.parts import allocate
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local
from anychip.recipe import Recipe
from anychip.train.accounting import Accounting, Term
from anychip.train.engine import Engine
from anychip.train.job import TrainingJob, training_job
from anychip.train.objective import Head
from anychip.train.optimizer import Optimizer

GIB = 2**30
_DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class DryRun:
    """What one rank would do. Bytes of parameters, gradients and optimizer are what stays between steps; `memory` is by
    term what was there when the step's memory was fullest.

    weights: what products are given: gathered, or in another type than the masters. gradients: summed up or just made.
    optimizer: fp32 masters and moments (masters are weights where products are fp32 too). activations: what forward
    keeps for backward, and what both have at hand. logits: all that the head and its loss make. buffers: what travels
    between shards and stages.
    """

    world_size: int
    rank: int
    layout: str
    place: dict[str, int]
    layers: list[int]
    parameters: int  # elements held
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    memory: dict[str, int]
    traffic: list[dict[str, Any]]  # group, processes, operation, calls and bytes sent a step
    micro_batches: int
    operators: int  # operators dispatched in a step
    seconds: dict[str, float] = field(default_factory=dict)
    resident_bytes: int = 0  # of this dry run itself, at its largest

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "total_bytes": self.total_bytes}

    def as_text(self) -> str:
        """A paragraph and two tables."""
        where = ", ".join(f"{axis} {place}" for axis, place in self.place.items()) or "the only one"
        layers = _ranges(self.layers)
        lines = [
            f"rank {self.rank} of {self.world_size:,} ({self.layout}): {where}; layers {layers}; "
            f"{self.parameters:,} parameters; {self.micro_batches} micro-batches a step",
            "",
        ]
        for name, size in self.memory.items():
            lines.append(f"{name:<18}{size / GIB:>10.3f} GiB")
        lines += [f"{'sum':<18}{self.total_bytes / GIB:>10.3f} GiB when memory is fullest", ""]
        for entry in self.traffic:
            group, sent = f"{entry['group']} ({entry['processes']})", entry["bytes"] / 1e9
            lines.append(f"sent over {group:<24}{entry['operation']:<16}{entry['calls']:>7,} calls  {sent:>10.3f} GB")
        took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        own = f"this dry run: {took}, {self.resident_bytes / 1e9:.1f} GB; {self.operators:,} operators in the step"
        return "\n".join([*lines, "", own])


def dry_run(recipe: Recipe, world_size: int, rank: int) -> DryRun:
    """Build and step one rank of `world_size`; once a process, because PyTorch keeps meshes as long as that lives.

    Raises InputError for a layout that does not fit the model or `world_size`, and for a rank that does not exist.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"there is no rank {rank} among {world_size} processes.", do="Ranks are counted from 0.")
    layout = resolve_layout(recipe.parallel, world_size)
    clock = _Phases()
    job = training_job(recipe, Path(), _NoData(), lambda parameters: None, None, identity="dry run")
    job = replace(job, compile=False)  # there is nothing to compile for
    dtype = _DTYPES[recipe.training.compute_dtype]
    with _fake_processes(world_size, rank):
        processes = Processes(recipe.parallel, layout, rank, torch.device("cpu"))
        groups = _group_names(processes)
        clock.phase("groups")
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        accounting = Accounting({name: axes for name, (axes, _) in groups.items()})

        masters: Term = "weights" if dtype == torch.float32 else "optimizer"

        def give_memory(part: Decoder, device: torch.device) -> None:
            with fake, accounting, accounting.complete(), accounting.term(masters):
                allocate(part, device)

        engine = _Engine(accounting, job, processes, dtype, give_memory=give_memory)
        clock.phase("model")
        with fake:
            batch = _full_batch(job)
        accounting.leave_out(batch.input_ids, batch.labels)  # the host reads whole batches, a device its rows
        with fake, accounting, accounting.complete():
            with accounting.term("optimizer"):
                optimizer = Optimizer(engine.parameters, job.optimizer, dtype)
            clock.phase("optimizer")
            accounting.keep_masters(local(p) for p in engine.parameters.values())
            for parameter in engine.trainable.values():
                parameter.register_post_accumulate_grad_hook(accounting.watch_gradient)
            operators_before = accounting.operators
            accounting.reset_peak()
            engine.begin_step(1)
            engine.forward_backward(batch)
            for parameter in engine.trainable.values():
                accounting.watch_gradient(parameter)
            gradient_norm(engine.learned, processes)
            gradients = [p.grad for p in engine.parameters.values() if p.grad is not None]
            gradient_bytes = sum(local(gradient).nbytes for gradient in gradients)
            optimizer.step(job.optimizer.lr)
            clock.phase("step")
            return DryRun(
                world_size=world_size,
                rank=rank,
                layout=layout.describe(),
                place={axis: place for axis, place in vars(processes.place).items() if getattr(layout, axis) > 1},
                layers=sorted({int(name.split(".")[1]) for name in engine.parameters if name.startswith("layers.")}),
                parameters=sum(local(p).numel() for p in engine.parameters.values()),
                parameter_bytes=sum(local(p).nbytes for p in engine.parameters.values()),
                gradient_bytes=gradient_bytes,
                optimizer_bytes=sum(local(value).nbytes for value in optimizer.state().values()),
                memory={str(term): size for term, size in accounting.peak.items()},
                traffic=_traffic(accounting, dict(groups.values()), world_size),
                micro_batches=job.global_batch_size // layout.readers // job.micro_batch_size,
                operators=accounting.operators - operators_before,
                seconds=clock.seconds,
                resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )


@dataclass(frozen=True)
class _Head(Head):
    """A head that says when it works."""

    accounting: Accounting | None = None

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        assert self.accounting is not None
        with self.accounting.term("logits"):
            return super().loss(hidden, labels)


class _Engine(Engine):
    def __init__(self, accounting: Accounting, *args: Any, **keywords: Any) -> None:
        self._accounting = accounting
        super().__init__(*args, **keywords)

    def _head(self) -> Head:
        return _Head(**vars(super()._head()), accounting=self._accounting)


class _Phases:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def phase(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._started, 3)
        self._started = now


class _NoData:
    def batch(self, step: int) -> Batch:
        raise InputError("a dry run reads no data.")

    def documents(self, step: int) -> list[str]:
        return []


class _FullBatch(Batch):
    """A batch in which every position carries loss; nobody may look at its tokens."""

    @cached_property
    def num_labels(self) -> int:
        return self.labels.numel()


def _assume_static_shapes(self: Any, stages: Any, has_backward: bool, p2p_done: bool) -> None:
    """What stages settle by a vote of all ranks: shapes are given, so each is in static mode."""
    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


def _full_batch(job: TrainingJob) -> Batch:
    shape = (job.global_batch_size, job.seq_length)
    return _FullBatch(torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64))


@contextmanager
def _fake_processes(world_size: int, rank: int) -> Iterator[None]:
    """A process group of `world_size` whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise InputError("a dry run is one process.", do="Start it without torchrun, as `anychip train --dry-run`.")
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    vote = _PipelineSchedule._warmup_p2p
    _PipelineSchedule._warmup_p2p = _assume_static_shapes  # type: ignore[method-assign]
    try:
        yield
    finally:
        _PipelineSchedule._warmup_p2p = vote  # type: ignore[method-assign]
        dist.destroy_process_group()
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)


def _group_names(processes: Processes) -> dict[str, tuple[str, int]]:
    """The axes and the size of each group of this process, by the group's name."""
    groups: dict[str, tuple[str, int]] = {}
    several = [("shard", "context"), ("replicate", "context"), READING_AXES]
    for axes in [(axis,) for axis in AXES] + several:
        group = processes.group(*axes)
        if group is not None:
            groups.setdefault(group.group_name, (" x ".join(axes), group.size()))
    for name, group in processes.expert_groups().items():
        groups.setdefault(group.group_name, (name, group.size()))
    return groups


def _traffic(accounting: Accounting, sizes: dict[str, int], world_size: int) -> list[dict[str, Any]]:
    return [
        {
            "group": group,
            "processes": sizes.get(group, world_size),
            "operation": kind,
            "calls": entry.calls,
            "bytes": round(entry.bytes),
        }
        for (group, kind), entry in sorted(accounting.traffic.items())
    ]


def _ranges(numbers: list[int]) -> str:
    """0-3, 12-15"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
