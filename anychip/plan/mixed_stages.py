"""Candidates of a mixed pipeline: which stages lie on which chips, and the layers that each can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anychip.plan.cost import EndCost, rank_seconds, step_terms
from anychip.plan.memory import rank_memory
from anychip.plan.pipeline import StageTimes
from anychip.plan.predict import hardware_for, missing_memory
from anychip.plan.ranks import rank_of
from anychip.plan.search import min_max_split
from anychip.plan.shapes import Work, work_of
from anychip.plan.table import Table, table_of
from anychip.plan.types import Floats, Layout, Machine, Recompute, Site, Workload

_SHARED_ANEW = 8  # times that layers are taken from stages that turn out too full


@dataclass(frozen=True)
class Part:
    machine: Machine
    site: Site


@dataclass(frozen=True)
class Candidate:
    layout: Layout
    parts: tuple[Part, ...]
    of_stage: tuple[int, ...]  # which part each stage lies on
    times: tuple[StageTimes, ...]
    ends: tuple[float, float]  # seconds of the first and of the last stage besides layers
    memory: dict[str, Floats]
    send_seconds: float
    outside: dict[str, float]  # gradients and optimizer of the slowest part
    estimate: float


def layouts(workload: Workload, parts: Sequence[Part]) -> Iterator[tuple[Layout, tuple[int, ...], str]]:
    """Layouts, the stages of each part (as many as its devices give), and why that cannot be; empty where it can."""
    smallest = min(part.machine.tiers[0].devices for part in parts)
    here = any(part.site.trained_here for part in parts)
    if here and (workload.tied_embeddings or workload.predicted_tokens):
        yield Layout(pp=len(parts)), (), "tied embeddings and modules for further tokens do not go through a pipeline"
        return
    kinds: tuple[Recompute, ...] = ("none", "selective", "full") if here else ("none", "full")
    for tp in [2**power for power in range(6) if 2**power <= smallest and workload.heads % 2**power == 0]:
        if workload.kv_heads % tp and tp % workload.kv_heads:
            yield Layout(tp=tp, pp=len(parts)), (), f"{workload.kv_heads} groups of heads do not divide by TP {tp}"
            continue
        if here and tp > 1 and (workload.experts or workload.latent):
            yield Layout(tp=tp, pp=len(parts)), (), "experts and latent attention are not split by TP"
            continue
        for dp in range(1, min(part.machine.devices for part in parts) // tp + 1):
            counts = tuple(part.machine.devices // (tp * dp) for part in parts)
            layout, even = (
                Layout(dp=dp, tp=tp, pp=sum(counts)),
                all(part.machine.devices % (tp * dp) == 0 for part in parts),
            )
            if workload.global_batch % dp:
                if even:  # others are not worth a word
                    yield layout, counts, f"global batch {workload.global_batch} does not divide by dp {dp}"
                continue
            if sum(counts) > workload.layers:
                yield layout, counts, f"{workload.layers} layers are fewer than its {sum(counts)} stages"
                continue
            for micro in (size for size in (1, 2, 4) if workload.global_batch % (dp * size) == 0):
                for ep in _expert_degrees(workload, dp):
                    for kind in kinds:
                        yield replace(layout, ep=ep, micro_batch=micro, recompute=kind), counts, ""


def _expert_degrees(workload: Workload, dp: int) -> list[int]:
    if workload.experts is None:
        return [1]
    return [2**power for power in range(10) if workload.experts.count % 2**power == 0 and dp % 2**power == 0]


def candidate_of(
    workload: Workload, layout: Layout, counts: tuple[int, ...], parts: Sequence[Part], between: float
) -> Candidate | tuple[float, str]:
    """Share the layers out and add up the step; when the stages cannot hold them, how much they lack, and why."""
    w = work_of(workload)
    table = table_of([layout], w.layers)
    of_stage = tuple(part for part, count in enumerate(counts) for _ in range(count))
    costs = [rank_seconds(w, table, hardware_for(part.machine, workload, part.site), part.site) for part in parts]
    each = [one_of(costs[part][0]) + one_of(costs[part][1]) for part in of_stage]
    ends = one_of(costs[of_stage[0]][3].first), one_of(costs[of_stage[-1]][3].last)
    extra = [ends[0], *[0.0] * (layout.pp - 2), ends[1]]
    shared = _shared(w, layout, of_stage, parts, each, extra)
    if not isinstance(shared, _Shared):
        return shared
    split, memory = shared.split, shared.memory
    times = _times(split, of_stage, costs, costs[of_stage[0]][3], costs[of_stage[-1]][3])
    placed = replace(layout, stage_layers=split)
    send = workload.seq_length * layout.micro_batch * workload.hidden * float(w.element) / layout.tp / between
    outside = max(
        (_outside(w, table_of([placed], w.layers), part, workload) for part in parts),
        key=lambda terms: sum(terms.values()),
    )
    m = layout.micro_batches(workload)
    totals = [stage.forward + stage.backward for stage in times]
    estimate = sum(totals) + (m - 1) * max(totals) + 2 * (m + layout.pp - 1) * send + sum(outside.values())
    return Candidate(placed, tuple(parts), of_stage, times, ends, memory, send, outside, estimate)


@dataclass(frozen=True)
class _Shared:
    split: tuple[int, ...]
    memory: dict[str, Floats]


def _shared(
    w: Work, layout: Layout, of_stage: Sequence[int], parts: Sequence[Part], each: list[float], extra: list[float]
) -> _Shared | tuple[float, str]:
    """Layers of each stage such that all fit and the slowest is fastest; or what is lacking."""
    most = _most_layers(w, table_of([layout], w.layers), of_stage, parts)
    room = np.array([parts[part].machine.memory_bytes for part in of_stage])
    names = [parts[part].machine.name for part in of_stage]
    layers, reason = int(w.layers), ""
    for _ in range(_SHARED_ANEW):
        if min(most) < 1:
            return 1.0, f"a stage on {names[most.index(min(most))]} cannot hold even one layer"
        more = min_max_split(  # beyond one layer for each stage
            layers - len(most),
            each,
            [seconds + one for seconds, one in zip(extra, each, strict=True)],
            [limit - 1 for limit in most],
        )
        if not more:
            held = {name: sum(n for n, at in zip(most, names, strict=True) if at == name) for name in names}
            said = ", ".join(f"{count} on {name}" for name, count in held.items())
            return 1 - sum(most) / layers, f"its stages hold {sum(most)} of {layers} layers ({said})"
        split = tuple(1 + count for count in more)
        placed = table_of([replace(layout, stage_layers=split)], w.layers)
        memory = _stage_memory(w, placed, of_stage, np.array(split, dtype=np.float64), parts)
        over = np.asarray(sum(memory.values())) - room
        if over.max() <= 0:
            return _Shared(split, memory)
        reason = f"stage {over.argmax()} on {names[int(over.argmax())]} is {missing_memory(over.max())} over"
        most = [
            min(limit, count) - 1 if lack > 0 else limit for limit, count, lack in zip(most, split, over, strict=True)
        ]
    return 0.0, reason


def one_of(value: Floats) -> float:
    return float(np.broadcast_to(value, (1,))[0])


def _times(
    split: Sequence[int],
    of_stage: Sequence[int],
    costs: Sequence[tuple[Floats, Floats, Floats, EndCost]],
    first: EndCost,
    last: EndCost,
) -> tuple[StageTimes, ...]:
    times = [
        StageTimes(*(count * one_of(value) for value in costs[part][:3]))
        for count, part in zip(split, of_stage, strict=True)
    ]
    for stage, seconds in ((0, one_of(first.first)), (len(times) - 1, one_of(last.last))):
        held = times[stage]
        times[stage] = StageTimes(held.forward + seconds / 3, held.backward + seconds * 2 / 3, held.weight)
    return tuple(times)


def _stage_memory(
    w: Work, table: Table, of_stage: Sequence[int], layers: Floats, parts: Sequence[Part]
) -> dict[str, Floats]:
    """Bytes by term of every stage with these layers, each [stages]; stages of one part in one pass."""
    found: dict[str, Floats] = {}
    for number, part in enumerate(parts):
        stages = np.flatnonzero(np.array(of_stage) == number)
        first, last = stages == 0, stages == len(of_stage) - 1
        every = table.take(np.zeros(len(stages), dtype=np.int64))
        rank = rank_of(
            w, every, stages.astype(np.float64), layers[stages], first.astype(np.float64), last.astype(np.float64)
        )
        for term, held in rank_memory(w, every, rank, part.site).items():
            found.setdefault(term, np.zeros(len(of_stage)))[stages] = held
    return found


def _most_layers(w: Work, table: Table, of_stage: Sequence[int], parts: Sequence[Part]) -> list[int]:
    """Layers that the memory of each stage's chips can hold, if bytes are affine in layers."""
    one = np.ones(len(of_stage))
    least, two = (np.asarray(sum(_stage_memory(w, table, of_stage, n * one, parts).values())) for n in (1, 2))
    room = np.array([parts[part].machine.memory_bytes for part in of_stage]) - least
    return [
        max(0, min(int(w.layers), math.floor(left / slope) + 1)) if slope > 0 else int(w.layers) * (left >= 0)
        for left, slope in zip(room, two - least, strict=True)
    ]


def _outside(w: Work, table: Table, part: Part, workload: Workload) -> dict[str, float]:
    terms = step_terms(w, table, hardware_for(part.machine, workload, part.site), part.site)
    return {name: one_of(terms[name]) for name in ("data_parallel", "optimizer")} | {
        "overhead": part.site.step_overhead_s
    }
