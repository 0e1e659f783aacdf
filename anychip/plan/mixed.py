"""Mixed clusters: pipeline stages on chips of different kinds, each with the layers that it can carry.

All stages share the tensor-, data- and expert-parallel degrees; a group of chips takes a run of consecutive stages.
Layers are alike, so sharing them out so that the slowest stage is fastest is exact; memory bounds what each stage may
take. What is found is compared with the best plan of each part by itself, on as many of its nodes as serve it best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from anychip.errors import InputError
from anychip.plan.answer import reliability_of
from anychip.plan.cost import EndCost, layer_cost, rank_seconds, step_terms
from anychip.plan.goodput import CHECKPOINT_BYTES_PER_PARAMETER, Reliability, goodput, reliability
from anychip.plan.memory import rank_memory
from anychip.plan.pipeline import StageTimes, pipeline_seconds
from anychip.plan.predict import GIB, hardware_for, measured
from anychip.plan.ranks import rank_of
from anychip.plan.search import min_max_split, tokens_per_second
from anychip.plan.shapes import Work, flops_per_token, num_parameters, work_of
from anychip.plan.table import Table, peak_of, table_of
from anychip.plan.types import Floats, Layout, Machine, Prediction, Recompute, Rejected, Site, Workload
from anychip.plan.usable import search_usable
from anychip.recipe.cluster import FailureConfig

SETTLED = 12  # candidates whose pipeline is simulated
_SHARED_ANEW = 8  # times that layers are taken from stages that turn out too full
_NOTHING_FAILS = FailureConfig()


@dataclass(frozen=True)
class MixedPlan:
    """A pipeline over several kinds of chips."""

    layout: Layout  # stage_layers holds the layers of every stage in order
    groups: tuple[str, ...]  # name of the machine of each stage
    step_seconds: float
    tokens_per_second: float  # of the whole cluster
    useful: float  # share of the time that failures leave
    mfu: float  # against the peaks of the devices in use
    stage_seconds: Floats  # [stages], one micro-batch
    time: dict[str, float]  # seconds by term, of the slowest stage; they add up to step_seconds
    memory: dict[str, Floats]  # bytes by term, each [stages]
    devices_used: dict[str, int]

    @property
    def memory_bytes(self) -> Floats:
        """Bytes of every stage, [stages]."""
        return np.asarray(sum(self.memory.values()), dtype=np.float64)


@dataclass(frozen=True)
class Alone:
    """One part by itself: its best plan, or why there is none."""

    devices: int  # of the part
    prediction: Prediction | None
    useful: float = 1.0  # share of the time that failures leave
    said: str = ""  # which of its devices are idle, or why it cannot run this

    @property
    def useful_tokens_per_second(self) -> float:
        """Of the whole part, after failures."""
        found = self.prediction
        return found.tokens_per_second_per_device * found.layout.devices * self.useful if found else 0.0


@dataclass(frozen=True)
class MixedResult:
    best: list[MixedPlan]
    alone: dict[str, Alone]
    rejected: list[Rejected]  # those that lack least come first
    gain: float  # tokens a day of the best plan over those of the best part alone, after failures
    seconds: float

    @property
    def verdict(self) -> str:
        """What mixing is worth, in a sentence."""
        if not self.best:
            nearest = self.rejected[0] if self.rejected else None
            return "No layout over all parts fits" + (
                f"; nearest is {nearest.layout}: {nearest.reason}."
                if nearest
                else ": there are more stages than layers."
            )
        name = max(self.alone, key=lambda key: self.alone[key].useful_tokens_per_second)
        part = self.alone[name].prediction
        if part is None:
            return "No part can run this alone; together they can."
        on = f"{name} alone" if part.layout.devices == self.alone[name].devices else (
            f"{name} alone on {part.layout.devices:,} of its {self.alone[name].devices:,} devices"
        )  # fmt: skip
        if self.gain <= 1.0:
            return f"Do not mix: {on} is {1 / self.gain:.2f} times as fast as the best pipeline over all parts."
        if self.gain < 1.005:
            return f"All parts together are hardly faster than {on}: mixing gains nothing."
        return f"All parts together are {self.gain:.2f} times as fast as {on}."


def search_mixed(
    workload: Workload,
    machines: Sequence[Machine],
    sites: Sequence[Site],
    between_bytes_per_s: float,
    failures: FailureConfig = _NOTHING_FAILS,
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
    alone = {
        machine.name: _alone(workload, machine, site, failures) for machine, site in zip(machines, sites, strict=True)
    }
    lacking: list[tuple[float, Rejected]] = []
    candidates: list[_Candidate] = []
    for order in permutations(range(len(machines))):
        parts = [_Part(machines[index], sites[index]) for index in order]
        for layout, counts, reason in _layouts(workload, parts):
            found = _candidate(workload, layout, counts, parts, between_bytes_per_s) if not reason else None
            if isinstance(found, _Candidate):
                candidates.append(found)
            else:
                lack, why = found or (math.inf, reason)
                lacking.append((lack, Rejected(layout, why)))
    candidates.sort(key=lambda candidate: candidate.estimate)
    plans = [_simulate(workload, candidate, failures) for candidate in candidates[:SETTLED]]
    plans.sort(key=lambda plan: -plan.tokens_per_second * plan.useful)
    best_alone = max(part.useful_tokens_per_second for part in alone.values())
    gain = plans[0].tokens_per_second * plans[0].useful / best_alone if plans and best_alone else 0.0
    rejected = [each for _, each in sorted(lacking, key=lambda pair: pair[0])]
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
    ends: tuple[float, float]  # seconds of the first and of the last stage besides layers
    memory: dict[str, Floats]
    send_seconds: float
    outside: dict[str, float]  # gradients and optimizer of the slowest part
    estimate: float


def _alone(workload: Workload, machine: Machine, site: Site, failures: FailureConfig) -> Alone:
    try:
        result, part, idle = search_usable(workload, machine, site, lambda _: tokens_per_second, keep=1)
    except InputError as error:
        return Alone(machine.devices, None, said=error.what.rstrip("."))
    if not result.best:
        return Alone(machine.devices, None, said=f"it fits in none of {result.considered:,} layouts: {result.notes[0]}")
    useful = _useful(workload, result.best[0].step_seconds, reliability_of(workload, part, failures))
    return Alone(machine.devices, result.best[0], useful, idle)


def _useful(workload: Workload, step_seconds: float, held: Reliability) -> float:
    return goodput(step_seconds, 0.0, workload.tokens, workload.tokens, held).effective


def reliability_of_parts(
    workload: Workload, machines: Sequence[Machine], used: dict[str, int], failures: FailureConfig
) -> Reliability:
    """How a job fails on the nodes that it uses of several machines."""
    nodes = sum(math.ceil(used[machine.name] / machine.devices_per_node) for machine in machines)
    state_bytes = CHECKPOINT_BYTES_PER_PARAMETER * float(num_parameters(workload))
    return reliability(failures, nodes, sum(used.values()), state_bytes)


def _layouts(workload: Workload, parts: Sequence[_Part]) -> Iterator[tuple[Layout, tuple[int, ...], str]]:
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


def _candidate(
    workload: Workload, layout: Layout, counts: tuple[int, ...], parts: Sequence[_Part], between: float
) -> _Candidate | tuple[float, str]:
    """Share the layers out and add up the step; when the stages cannot hold them, how much they lack, and why."""
    w = work_of(workload)
    table = table_of([layout], w.layers)
    of_stage = tuple(part for part, count in enumerate(counts) for _ in range(count))
    costs = [rank_seconds(w, table, hardware_for(part.machine, workload, part.site), part.site) for part in parts]
    each = [_one(costs[part][0]) + _one(costs[part][1]) for part in of_stage]
    ends = _one(costs[of_stage[0]][3].first), _one(costs[of_stage[-1]][3].last)
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
    return _Candidate(placed, tuple(parts), of_stage, times, ends, memory, send, outside, estimate)


@dataclass(frozen=True)
class _Shared:
    split: tuple[int, ...]
    memory: dict[str, Floats]


def _shared(
    w: Work, layout: Layout, of_stage: Sequence[int], parts: Sequence[_Part], each: list[float], extra: list[float]
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
        reason = f"stage {over.argmax()} on {names[int(over.argmax())]} is {over.max() / GIB:.1f} GiB over"
        most = [
            min(limit, count) - 1 if lack > 0 else limit for limit, count, lack in zip(most, split, over, strict=True)
        ]
    return 0.0, reason


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


def _stage_memory(
    w: Work, table: Table, of_stage: Sequence[int], layers: Floats, parts: Sequence[_Part]
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


def _most_layers(w: Work, table: Table, of_stage: Sequence[int], parts: Sequence[_Part]) -> list[int]:
    """Layers that the memory of each stage's chips can hold, if bytes are affine in layers."""
    one = np.ones(len(of_stage))
    least, two = (np.asarray(sum(_stage_memory(w, table, of_stage, n * one, parts).values())) for n in (1, 2))
    room = np.array([parts[part].machine.memory_bytes for part in of_stage]) - least
    return [
        max(0, min(int(w.layers), math.floor(left / slope) + 1)) if slope > 0 else int(w.layers) * (left >= 0)
        for left, slope in zip(room, two - least, strict=True)
    ]


def _outside(w: Work, table: Table, part: _Part, workload: Workload) -> dict[str, float]:
    terms = step_terms(w, table, hardware_for(part.machine, workload, part.site), part.site)
    return {name: _one(terms[name]) for name in ("data_parallel", "optimizer")} | {
        "overhead": part.site.step_overhead_s
    }


def _simulate(workload: Workload, candidate: _Candidate, failures: FailureConfig) -> MixedPlan:
    layout, parts = candidate.layout, candidate.parts
    m = layout.micro_batches(workload)
    still, length = (
        pipeline_seconds(candidate.times, layout.pp, m, layout.schedule, send) for send in (0.0, candidate.send_seconds)
    )
    step = length + sum(candidate.outside.values())
    per_stage = layout.tp * layout.dp
    used = {part.machine.name: candidate.of_stage.count(index) * per_stage for index, part in enumerate(parts)}
    peak = sum(used[part.machine.name] * peak_of(part.machine, workload.dtype) for part in parts)
    rate = workload.tokens / step
    held = reliability_of_parts(workload, [part.machine for part in parts], used, failures)
    return MixedPlan(
        layout=layout,
        groups=tuple(parts[part].machine.name for part in candidate.of_stage),
        step_seconds=step,
        tokens_per_second=rate,
        useful=_useful(workload, step, held),
        mfu=rate * float(flops_per_token(work_of(workload))) / peak,
        stage_seconds=np.array([stage.forward + stage.backward for stage in candidate.times]),
        time=_terms(workload, candidate, m, still, length),
        memory=candidate.memory,
        devices_used=used,
    )


def _terms(workload: Workload, candidate: _Candidate, m: int, still: float, length: float) -> dict[str, float]:
    """The step by terms as the slowest stage spends it; what it waits for others is bubble."""
    busy = [stage.forward + stage.backward for stage in candidate.times]
    slowest = int(np.argmax(busy))
    part = candidate.parts[candidate.of_stage[slowest]]
    w = work_of(workload)
    layer = layer_cost(
        w, table_of([candidate.layout], w.layers), hardware_for(part.machine, workload, part.site), part.site
    )
    count = m * candidate.layout.stage_layers[slowest]
    both = {
        "matmul": "matmul", "attention": "attention", "pointwise": "pointwise", "overhead": "overhead",
        "tensor_parallel": "tensor", "expert_parallel": "expert",
    }  # fmt: skip
    time = {
        name: count * (_one(getattr(layer.forward, kind)) + _one(getattr(layer.backward, kind)))
        for name, kind in both.items()
    }
    time["recompute"] = count * _one(layer.recomputed)
    time["ends"] = m * ((slowest == 0) * candidate.ends[0] + (slowest == len(busy) - 1) * candidate.ends[1])
    time["bubble"] = still - m * busy[slowest]
    time["pipeline_transfer"] = length - still
    for name, seconds in candidate.outside.items():
        time[name] = time.get(name, 0.0) + seconds
    return time


def headroom(plan: MixedPlan, machines: Sequence[Machine]) -> dict[str, float]:
    """GiB that the fullest stage of each machine leaves free."""
    free: dict[str, float] = {}
    for machine in machines:
        held = [size for size, name in zip(plan.memory_bytes, plan.groups, strict=True) if name == machine.name]
        free[machine.name] = (machine.memory_bytes - max(held)) / GIB
    return free
