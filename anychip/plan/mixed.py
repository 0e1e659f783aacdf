"""Mixed clusters: pipeline stages on chips of different kinds, each with the layers that it can carry.

All stages share the tensor- and data-parallel degrees; a group of chips takes a run of consecutive stages. Layers are
alike, so sharing them out so that the slowest stage is fastest is exact; memory bounds what each stage may take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from anychip.errors import InputError
from anychip.plan.cost import EndCost, rank_seconds, step_terms
from anychip.plan.memory import rank_memory
from anychip.plan.pipeline import StageTimes, pipeline_seconds
from anychip.plan.predict import GIB, hardware_for, measured
from anychip.plan.ranks import rank_of
from anychip.plan.search import min_max_split, search
from anychip.plan.shapes import Work, flops_per_token, work_of
from anychip.plan.table import Table, peak_of, table_of
from anychip.plan.types import Floats, Layout, Machine, Prediction, Recompute, Rejected, Site, Workload

SETTLED = 12  # candidates whose pipeline is simulated


@dataclass(frozen=True)
class MixedPlan:
    """A pipeline over several kinds of chips."""

    layout: Layout  # stage_layers holds the layers of every stage in order
    groups: tuple[str, ...]  # name of the machine of each stage
    step_seconds: float
    tokens_per_second: float  # of the whole cluster
    mfu: float  # against the peaks of the devices in use
    stage_seconds: Floats  # [stages], one micro-batch
    memory_bytes: Floats  # [stages]
    devices_used: dict[str, int]


@dataclass(frozen=True)
class MixedResult:
    best: list[MixedPlan]
    alone: dict[str, Prediction]  # the best plan of each part by itself, where one fits
    rejected: list[Rejected]
    gain: float  # tokens/s of the best plan over those of the best part alone
    seconds: float

    @property
    def verdict(self) -> str:
        """What mixing is worth, in a sentence."""
        if not self.best:
            return "No layout over all parts fits."
        if not self.alone:
            return "No part can run this alone; together they can."
        name = max(self.alone, key=lambda key: _total(self.alone[key]))
        if self.gain <= 1.0:
            return f"Do not mix: {name} alone is {1 / self.gain:.2f} times as fast as the best pipeline over all parts."
        return f"All parts together are {self.gain:.2f} times as fast as {name} alone."


def search_mixed(
    workload: Workload,
    machines: Sequence[Machine],
    sites: Sequence[Site],
    between_bytes_per_s: float,
    *,
    keep: int = 10,
) -> MixedResult:
    """The best pipelines over all machines, compared with the best plan on each machine alone.

    `between_bytes_per_s` is what one device can send to a device of another machine.
    """
    started = time.perf_counter()
    if len(machines) < 2:
        raise InputError("a mixed plan needs at least two kinds of chips.", do="Use `search` for one kind.")
    machines = [measured(machine, site) for machine, site in zip(machines, sites, strict=True)]
    alone = _alone(workload, machines, sites)
    rejected: list[Rejected] = []
    candidates: list[tuple[float, _Candidate]] = []
    for order in permutations(range(len(machines))):
        ordered = [machines[index] for index in order]
        parts = [_Part(machine, sites[index]) for machine, index in zip(ordered, order, strict=True)]
        for layout, counts in _layouts(workload, parts):
            found = _candidate(workload, layout, counts, parts, between_bytes_per_s)
            if isinstance(found, str):
                rejected.append(Rejected(layout, found))
            else:
                candidates.append((found.estimate, found))
    candidates.sort(key=lambda pair: pair[0])
    plans = [_simulate(workload, candidate) for _, candidate in candidates[:SETTLED]]
    plans.sort(key=lambda plan: plan.step_seconds)
    best_alone = max((_total(prediction) for prediction in alone.values()), default=0.0)
    gain = plans[0].tokens_per_second / best_alone if plans and best_alone else 0.0
    return MixedResult(plans[:keep], alone, rejected, gain, time.perf_counter() - started)


@dataclass(frozen=True)
class _Part:
    machine: Machine
    site: Site


@dataclass(frozen=True)
class _Candidate:
    layout: Layout
    parts: tuple[_Part, ...]
    of_stage: tuple[int, ...]  # which part each stage lies on
    times: tuple[StageTimes, ...]
    memory: Floats
    send_seconds: float
    outside_seconds: float  # gradients and optimizer of the slowest part
    estimate: float


def _alone(workload: Workload, machines: Sequence[Machine], sites: Sequence[Site]) -> dict[str, Prediction]:
    found: dict[str, Prediction] = {}
    for machine, site in zip(machines, sites, strict=True):
        try:
            best = search(workload, machine, site, keep=1).best
        except InputError:
            continue
        if best:
            found[machine.name] = best[0]
    return found


def _total(prediction: Prediction) -> float:
    return prediction.tokens_per_second_per_device * prediction.layout.devices


def _layouts(workload: Workload, parts: Sequence[_Part]) -> list[tuple[Layout, tuple[int, ...]]]:
    """Layouts and the stages of each part: as many as its devices give, or half of them where that divides better."""
    found: list[tuple[Layout, tuple[int, ...]]] = []
    smallest = min(part.machine.tiers[0].devices for part in parts)
    kinds: tuple[Recompute, ...] = ("none", "full")
    for tp in [2**power for power in range(6) if 2**power <= smallest and workload.heads % 2**power == 0]:
        if workload.kv_heads % tp and tp % workload.kv_heads:
            continue
        for dp in range(1, min(part.machine.devices for part in parts) // tp + 1):
            counts = tuple(part.machine.devices // (tp * dp) for part in parts)
            if workload.global_batch % dp or not all(counts) or sum(counts) > workload.layers:
                continue
            for micro in (1, 2, 4):
                if workload.global_batch % (dp * micro) == 0:
                    found += [
                        (Layout(dp=dp, tp=tp, pp=sum(counts), micro_batch=micro, recompute=kind), counts)
                        for kind in kinds
                    ]
    return found


def _candidate(
    workload: Workload, layout: Layout, counts: tuple[int, ...], parts: Sequence[_Part], between: float
) -> _Candidate | str:
    """Share the layers out and add up the step; a sentence when the stages cannot hold them."""
    w = work_of(workload)
    table = table_of([layout], w.layers)
    of_stage = tuple(part for part, count in enumerate(counts) for _ in range(count))
    costs = [rank_seconds(w, table, hardware_for(part.machine, workload, part.site), part.site) for part in parts]
    each = [_one(costs[part][0]) + _one(costs[part][1]) for part in of_stage]
    first, last = costs[of_stage[0]][3], costs[of_stage[-1]][3]
    extra = [0.0] * layout.pp
    extra[0] += _one(first.first)
    extra[-1] += _one(last.last)
    most = _most_layers(w, table, of_stage, parts)
    split = min_max_split(workload.layers, each, extra, most)
    if not split or not min(split):
        return f"its stages hold {sum(most)} of {workload.layers} layers"
    times = _times(split, of_stage, costs, first, last)
    memory = _stage_bytes(w, table, of_stage, np.array(split, dtype=np.float64), parts)
    placed = replace(layout, stage_layers=split)
    send = workload.seq_length * layout.micro_batch * workload.hidden * 2.0 / layout.tp / between
    outside = max(_outside(w, table_of([placed], w.layers), part, workload) for part in parts)
    m = layout.micro_batches(workload)
    totals = [stage.forward + stage.backward for stage in times]
    estimate = sum(totals) + (m - 1) * max(totals) + 2 * (m + layout.pp - 1) * send + outside
    return _Candidate(placed, tuple(parts), of_stage, times, memory, send, outside, estimate)


def _one(value: Floats) -> float:
    return float(np.broadcast_to(value, (1,))[0])


def _times(
    split: Sequence[int],
    of_stage: Sequence[int],
    costs: Sequence[tuple[Floats, Floats, Floats, EndCost]],
    first: EndCost,
    last: EndCost,
) -> tuple[StageTimes, ...]:
    times = [
        StageTimes(*(count * _one(value) for value in costs[part][:3]))
        for count, part in zip(split, of_stage, strict=True)
    ]
    for stage, seconds in ((0, _one(first.first)), (len(times) - 1, _one(last.last))):
        held = times[stage]
        times[stage] = StageTimes(held.forward + seconds / 3, held.backward + seconds * 2 / 3, held.weight)
    return tuple(times)


def _stage_bytes(w: Work, table: Table, of_stage: Sequence[int], layers: Floats, parts: Sequence[_Part]) -> Floats:
    """Bytes of every stage with these layers, [stages]; stages of one part in one pass."""
    found = np.zeros(len(of_stage))
    for number, part in enumerate(parts):
        stages = np.flatnonzero(np.array(of_stage) == number)
        first, last = stages == 0, stages == len(of_stage) - 1
        every = table.take(np.zeros(len(stages), dtype=np.int64))
        rank = rank_of(
            w, every, stages.astype(np.float64), layers[stages], first.astype(np.float64), last.astype(np.float64)
        )
        found[stages] = np.asarray(sum(rank_memory(w, every, rank, part.site).values()))
    return found


def _most_layers(w: Work, table: Table, of_stage: Sequence[int], parts: Sequence[_Part]) -> list[int]:
    """Layers that the memory of each stage's chips can hold; bytes are affine in layers."""
    one = np.ones(len(of_stage))
    least = _stage_bytes(w, table, of_stage, one, parts)
    slopes = _stage_bytes(w, table, of_stage, 2 * one, parts) - least
    room = np.array([parts[part].machine.memory_bytes for part in of_stage]) - least
    return [
        max(0, int(left / slope) + 1) if slope > 0 else int(w.layers) for left, slope in zip(room, slopes, strict=True)
    ]


def _outside(w: Work, table: Table, part: _Part, workload: Workload) -> float:
    terms = step_terms(w, table, hardware_for(part.machine, workload, part.site), part.site)
    return _one(terms["data_parallel"]) + _one(terms["optimizer"]) + part.site.step_overhead_s


def _simulate(workload: Workload, candidate: _Candidate) -> MixedPlan:
    layout, parts = candidate.layout, candidate.parts
    length = pipeline_seconds(
        candidate.times, layout.pp, layout.micro_batches(workload), layout.schedule, candidate.send_seconds
    )
    step = length + candidate.outside_seconds
    per_stage = layout.tp * layout.dp
    used = {part.machine.name: candidate.of_stage.count(index) * per_stage for index, part in enumerate(parts)}
    peak = sum(used[part.machine.name] * peak_of(part.machine, workload.dtype) for part in parts)
    rate = workload.tokens / step
    return MixedPlan(
        layout=layout,
        groups=tuple(parts[part].machine.name for part in candidate.of_stage),
        step_seconds=step,
        tokens_per_second=rate,
        mfu=rate * float(flops_per_token(work_of(workload))) / peak,
        stage_seconds=np.array([stage.forward + stage.backward for stage in candidate.times]),
        memory_bytes=candidate.memory,
        devices_used=used,
    )


def headroom(plan: MixedPlan, machines: Sequence[Machine]) -> dict[str, float]:
    """GiB that the fullest stage of each machine leaves free."""
    free: dict[str, float] = {}
    for machine in machines:
        held = [size for size, name in zip(plan.memory_bytes, plan.groups, strict=True) if name == machine.name]
        free[machine.name] = (machine.memory_bytes - max(held)) / GIB
    return free


def mixed_json(result: MixedResult) -> dict[str, Any]:
    """The result as JSON values."""
    return {
        "best": [
            {
                "layout": str(plan.layout),
                "stage_layers": list(plan.layout.stage_layers),
                "groups": list(plan.groups),
                "step_seconds": plan.step_seconds,
                "tokens_per_second": plan.tokens_per_second,
                "mfu": plan.mfu,
                "stage_seconds": [float(value) for value in plan.stage_seconds],
                "memory_bytes": [float(value) for value in plan.memory_bytes],
                "devices_used": plan.devices_used,
            }
            for plan in result.best
        ],
        "alone": {name: str(prediction.layout) for name, prediction in result.alone.items()},
        "gain": result.gain,
        "verdict": result.verdict,
        "rejected": len(result.rejected),
        "seconds": result.seconds,
    }
