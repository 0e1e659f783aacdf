"""Searching layouts: the whole grid by the closed form, memory first; the best few settled by event simulation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import overload

import numpy as np

from anychip.errors import InputError
from anychip.plan.cost import rank_seconds
from anychip.plan.pipeline import StageTimes, pipeline_seconds
from anychip.plan.predict import Predictions, fullest_rank, hardware_for, missing_memory, predict, predict_many
from anychip.plan.rules import lacks_micro_batches, misfit, unshared, untrained_degrees
from anychip.plan.shapes import work_of
from anychip.plan.table import METHODS, Table, layers_by_rank, layout_at, rank_ends, stage_layers, table_of
from anychip.plan.types import (
    RECOMPUTES,
    SCHEDULES,
    ContextMethod,
    Floats,
    Layout,
    Machine,
    Prediction,
    Recompute,
    Rejected,
    Schedule,
    SearchResult,
    Site,
    Workload,
)
from anychip.recipe.schema import TWO_STAGE_SCHEDULES

Objective = Callable[[Predictions], Floats]
CHUNK = 20_000
_MICRO_BATCHES = "the schedule does not work with so many micro-batches"
_BATCH = "global batch does not divide by dp x micro-batch"


def tokens_per_second(predictions: Predictions) -> Floats:
    """The default objective: throughput, whatever fails."""
    return predictions.tokens_per_second_per_device


@dataclass(frozen=True)
class Space:
    """What the search may choose from; empty means everything that divides."""

    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    cp: tuple[int, ...] = (1, 2, 4, 8)
    ep: tuple[int, ...] = ()
    micro_batch: tuple[int, ...] = (1, 2, 4, 8)
    zero: tuple[int, ...] = (1, 2, 3)
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    schedules: tuple[Schedule, ...] = ("1f1b", "interleaved", "zero_bubble", "dualpipe_v")
    max_vpp: int = 8
    context_method: ContextMethod = "ring"
    trained_here: bool = False  # only what this software trains


def search(
    workload: Workload,
    machine: Machine,
    site: Site,
    objective: Objective = tokens_per_second,
    *,
    space: Space | None = None,
    context_method: ContextMethod = "ring",
    keep: int = 10,
    settle: int = 24,
) -> SearchResult:
    """The best layouts of a workload on one kind of devices.

    The `settle` best of the closed form are simulated with the layers shared out anew, then ranked again. Without a
    `space`, context parallelism goes by `context_method`. Raises InputError when no layout at all divides.
    """
    started = time.perf_counter()
    space = space or _default_space(workload, site, context_method)
    grid = _grid(workload, machine, space)
    if not len(grid.table):
        raise InputError(
            f"no layout of {machine.devices} devices divides global batch {workload.global_batch}, "
            f"{workload.layers} layers and {workload.heads} heads.",
            do="Change the global batch size or the number of devices.",
        )
    scores, over, fullest = _evaluate(workload, grid.table, machine, site, objective)
    order = np.lexsort((over, -np.where(over > 0, -np.inf, scores)))
    order = _distinct(grid.table, order[: 8 * settle], scores)[:settle]
    fitting = [index for index in order if over[index] <= 0]
    settled = [_settled(workload, layout_at(grid.table, index), machine, site) for index in fitting]
    ranked = sorted(settled, key=lambda pair: -_score(pair, workload, machine, site, objective))
    rejections = Rejections(grid.table, over, fullest, grid.refused)
    nearest = rejections.nearest(1)
    notes = () if ranked or not nearest else (f"{nearest[0].layout} is nearest, {nearest[0].reason}",)
    return SearchResult(
        best=[prediction for prediction, _ in ranked[:keep]],
        rejected=rejections,
        considered=len(grid.table),
        seconds=time.perf_counter() - started,
        notes=notes,
    )


def possible(workload: Workload, machine: Machine, site: Site) -> tuple[list[Rejected], bool]:
    """One layout for each reason why degrees do not divide, and whether there are others that do."""
    grid = _grid(workload, machine, _default_space(workload, site, "ring"))
    return grid.refused, len(grid.table) > 0


class Rejections(Sequence[Rejected]):
    """All layouts that cannot run, each with its reason; made when they are looked at, because there are very many."""

    def __init__(self, table: Table, over: Floats, fullest: Floats, refused: list[Rejected]) -> None:
        self._table, self._over, self._fullest, self._refused = table, over, fullest, refused
        self._indices = np.flatnonzero(over > 0)

    def __len__(self) -> int:
        return len(self._refused) + len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Rejected: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rejected]: ...
    def __getitem__(self, index: int | slice) -> Rejected | list[Rejected]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index < len(self._refused):
            return self._refused[index]
        return self._over_memory(int(self._indices[index - len(self._refused)]))

    def __iter__(self) -> Iterator[Rejected]:
        return (self[index] for index in range(len(self)))

    def counts(self) -> dict[str, int]:
        """How many were rejected for memory and for each other reason."""
        found = {"over memory": len(self._indices)} if len(self._indices) else {}
        for rejected in self._refused:
            kind = rejected.kind or rejected.reason
            found[kind] = found.get(kind, 0) + 1
        return found

    def nearest(self, count: int) -> list[Rejected]:
        """Of those that only memory keeps out, the ones that lack least of it."""
        order = np.argsort(self._over[self._indices], kind="stable")[:count]
        return [self._over_memory(int(place)) for place in self._indices[order]]

    def _over_memory(self, place: int) -> Rejected:
        reason = f"stage {self._fullest[place]:.0f} is {missing_memory(self._over[place])} over"
        return Rejected(layout_at(self._table, place), reason)


@dataclass(frozen=True)
class _Grid:
    table: Table
    refused: list[Rejected] = field(default_factory=list)


def _default_space(workload: Workload, site: Site, context_method: ContextMethod) -> Space:
    """Selective recomputation saves nothing where attention is fused; long sequences alone need context parallelism."""
    recompute: tuple[Recompute, ...] = ("none", "full") if site.fused_attention else ("none", "selective", "full")
    if site.trained_here:
        recompute = ("none", "selective", "full")
    lengths = tuple(2**power for power in range(7) if workload.seq_length // 2**power >= 2048) or (1,)
    cp = lengths if workload.seq_length > 8192 else (1,)
    zero = (0, 1, 3) if site.trained_here else (1, 2, 3)
    return Space(cp=cp, recompute=recompute, zero=zero, context_method=context_method, trained_here=site.trained_here)


def _grid(workload: Workload, machine: Machine, space: Space) -> _Grid:
    """Every combination of degrees that divides, as arrays, and the others with their reasons."""
    refused: list[Rejected] = []
    blocks: list[dict[str, Floats]] = []
    for tp, pp, cp in product(_tensor(workload, space), _pipeline(workload, space), space.cp):
        reason = misfit(workload, machine, tp, pp, cp)
        if not reason and space.trained_here:
            reason = untrained_degrees(workload, tp, pp, cp)
        if reason:
            refused.append(Rejected(Layout(tp=tp, pp=pp, cp=cp), reason, f"tp{tp} pp{pp} cp{cp}"))
            continue
        dp = machine.devices // (tp * pp * cp)
        degrees = f"dp{dp} tp{tp} pp{pp} cp{cp}"
        sizes = [size for size in space.micro_batch if workload.global_batch % (dp * size) == 0]
        for size in sorted({*space.micro_batch} - {*sizes}):
            reason = f"global batch {workload.global_batch} does not divide by dp {dp} x micro-batch {size}"
            refused.append(Rejected(Layout(dp=dp, tp=tp, pp=pp, cp=cp), reason, f"{degrees} mbs{size}", _BATCH))
        if not sizes:
            continue
        counts = [workload.global_batch // (dp * size) for size in sizes]
        schedules = _schedules(workload, space, pp, counts)
        refused += _starved(space, Layout(dp=dp, tp=tp, pp=pp, cp=cp), sizes, counts, degrees)
        if not schedules:
            continue
        experts = _experts(workload, space, dp, cp, tp)
        blocks.append(_block(tp, pp, cp, dp, sizes, schedules, experts, space))
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in (blocks[0] if blocks else {})}
    return _Grid(_table(columns, workload, space) if blocks else table_of([], np.zeros(0)), refused)


def _starved(space: Space, layout: Layout, sizes: list[int], counts: list[int], degrees: str) -> list[Rejected]:
    """Schedules that a pipeline of this length has too few micro-batches for."""
    found = []
    for (size, count), schedule in product(zip(sizes, counts, strict=True), space.schedules if layout.pp > 1 else ()):
        if reason := lacks_micro_batches(schedule, layout.pp, count, space.trained_here):
            chosen = replace(layout, micro_batch=size, schedule=schedule)
            found.append(Rejected(chosen, reason, f"{degrees} mbs{size} {schedule}", _MICRO_BATCHES))
    return found


def _tensor(workload: Workload, space: Space) -> tuple[int, ...]:
    return space.tp or tuple(2**power for power in range(6) if workload.heads % 2**power == 0)


def _pipeline(workload: Workload, space: Space) -> tuple[int, ...]:
    """Powers of two, and divisors of the layers; others leave ranks with too little to do."""
    if space.pp:
        return space.pp
    powers = {2**power for power in range(7)}
    divisors = {count for count in range(1, 97) if workload.layers % count == 0}
    return tuple(sorted(count for count in powers | divisors if count <= workload.layers))


def _schedules(workload: Workload, space: Space, pp: int, counts: list[int]) -> list[tuple[int, int, int]]:
    """(index of micro-batch size, schedule, chunks) that are possible together."""
    found: list[tuple[int, int, int]] = []
    for position, count in enumerate(counts):
        if pp == 1:
            found.append((position, SCHEDULES.index("1f1b"), 1))
            continue
        for schedule in space.schedules:
            if lacks_micro_batches(schedule, pp, count, space.trained_here):
                continue
            if schedule == "interleaved":
                chunks = [v for v in range(2, space.max_vpp + 1) if workload.layers % (pp * v) == 0]
                found += [(position, SCHEDULES.index(schedule), v) for v in chunks]
            elif schedule in TWO_STAGE_SCHEDULES:
                if 2 * pp <= workload.layers:
                    found.append((position, SCHEDULES.index(schedule), 2))
            else:
                found.append((position, SCHEDULES.index(schedule), 1))
    return found


def _experts(workload: Workload, space: Space, dp: int, cp: int, tp: int) -> list[int]:
    """Expert-parallel degrees; elsewhere tensor- and context-parallel ranks share the experts out like the others."""
    if workload.experts is None:
        return [1]
    degrees = space.ep or tuple(2**power for power in range(10))
    ranks = dp if space.trained_here else dp * cp * tp
    return [ep for ep in degrees if workload.experts.count % ep == 0 and ranks % ep == 0]


def _block(
    tp: int, pp: int, cp: int, dp: int, sizes: list[int], schedules: list[tuple[int, int, int]], experts: list[int],
    space: Space,
) -> dict[str, Floats]:  # fmt: skip
    """All combinations of what is left once tp, pp, cp and dp stand."""
    zeros = [zero for zero in space.zero if dp * cp > 1 or zero == space.zero[0]]
    zeros = [zero for zero in zeros if zero < 2 or pp == 1]  # a pipeline would reduce or gather for every micro-batch
    if space.trained_here:
        zeros = [zero for zero in zeros if not unshared(Layout(dp=dp, tp=tp, pp=pp, cp=cp, zero=zero))]
    recompute = [RECOMPUTES.index(kind) for kind in space.recompute]
    chosen, ep, zero, kind = (
        axis.ravel() for axis in np.meshgrid(np.arange(len(schedules)), experts, zeros, recompute, indexing="ij")
    )
    if space.trained_here:  # experts are shared among shards
        possible = (ep == 1) | (zero > 0)
        chosen, ep, zero, kind = chosen[possible], ep[possible], zero[possible], kind[possible]
    picked = np.array(schedules, dtype=np.float64).reshape(-1, 3)[chosen.astype(np.int64)]
    one = np.ones(len(chosen))
    return {
        "dp": dp * one,
        "tp": tp * one,
        "pp": pp * one,
        "cp": cp * one,
        "ep": ep.astype(np.float64),
        "zero": zero.astype(np.float64),
        "recompute": kind.astype(np.float64),
        "mbs": np.array(sizes, dtype=np.float64)[picked[:, 0].astype(np.int64)],
        "schedule": picked[:, 1],
        "vpp": picked[:, 2],
    }


def _table(columns: dict[str, Floats], workload: Workload, space: Space) -> Table:
    """Columns of the grid as a table; layers are shared out evenly."""
    one = np.ones(len(columns["pp"]))
    kinds, which = np.unique(
        np.stack([columns[name] for name in ("pp", "vpp", "schedule")], axis=1), axis=0, return_inverse=True
    )
    splits = [
        rank_ends(Layout(pp=int(pp), vpp=int(vpp), schedule=SCHEDULES[int(schedule)]), workload.layers)
        for pp, vpp, schedule in kinds
    ]
    ends = np.array(splits, dtype=np.float64)[which.ravel()]
    return Table(
        **columns,
        expert_tp=one,
        expert_node=0 * one,
        shard=columns["dp"] * columns["cp"],
        sp=(columns["tp"] > 1) * one,
        recompute_layers=0 * one,
        method=METHODS.index(space.context_method) * one,
        overlap_tensor=one,
        overlap_data=one,
        first_layers=ends[:, 0],
        inner_layers=ends[:, 1],
        inner_place=ends[:, 2],
        last_layers=ends[:, 3],
    )


def _evaluate(
    workload: Workload, table: Table, machine: Machine, site: Site, objective: Objective
) -> tuple[Floats, Floats, Floats]:
    """Score of each layout, bytes over the device's memory, and the stage that has most of them; layouts that do not
    fit are not timed."""
    w = work_of(workload)
    scores, over, fullest = np.full(len(table), -np.inf), np.empty(len(table)), np.empty(len(table))
    for start in range(0, len(table), CHUNK):
        part = slice(start, min(start + CHUNK, len(table)))
        held, fullest[part] = fullest_rank(w, table.take(part), site)
        over[part] = held - machine.memory_bytes
    fitting = np.flatnonzero(over <= 0)
    for start in range(0, len(fitting), CHUNK):
        chosen = fitting[start : start + CHUNK]
        scores[chosen] = objective(predict_many(workload, table.take(chosen), machine, site))
    return scores, over, fullest


def _distinct(table: Table, order: np.ndarray, scores: Floats) -> np.ndarray:
    """Of layouts that score alike and differ only in what saves memory (ZeRO, recomputation), the first: `order` has
    the one with the most room before the others."""
    seen: set[tuple[float, ...]] = set()
    kept: list[int] = []
    for index in order:
        key = tuple(float(getattr(table, name)[index]) for name in ("dp", "tp", "pp", "vpp", "cp", "ep", "mbs"))
        key += (float(table.schedule[index]), float(f"{scores[index]:.9g}"))
        if key not in seen:
            seen.add(key)
            kept.append(int(index))
    return np.array(kept, dtype=np.int64)


def _settled(workload: Workload, layout: Layout, machine: Machine, site: Site) -> tuple[Prediction, float]:
    """The prediction of a layout after sharing its layers out and simulating its pipeline, and the factor gained."""
    if layout.pp == 1:
        return predict(workload, layout, machine, site), 1.0
    candidates = [layout]
    if layout.vpp == 1:
        balanced = balance_layers(workload, layout, machine, site)
        if balanced and list(balanced) != layers_by_rank(layout, workload.layers):
            candidates.append(replace(layout, stage_layers=balanced))
    predictions = [
        simulated(workload, predict(workload, candidate, machine, site), machine, site) for candidate in candidates
    ]
    best = min((p for p in predictions if p.fits), key=lambda p: p.step_seconds, default=predictions[0])
    return best, predictions[0].step_seconds / best.step_seconds


def _score(
    pair: tuple[Prediction, float], workload: Workload, machine: Machine, site: Site, objective: Objective
) -> float:
    """The objective of a settled prediction: that of the closed form, corrected by what the simulation found."""
    prediction, _ = pair
    many = predict_many(workload, [prediction.layout], machine, site)
    factor = many.step_seconds / prediction.step_seconds
    corrected = replace(
        many,
        step_seconds=many.step_seconds / factor,
        tokens_per_second_per_device=many.tokens_per_second_per_device * factor,
        mfu=many.mfu * factor,
    )
    return float(objective(corrected)[0])


def simulated(workload: Workload, prediction: Prediction, machine: Machine, site: Site) -> Prediction:
    """The prediction with its bubble taken from an event simulation of the pipeline instead of the closed form."""
    layout = prediction.layout
    stages, micro_batches = stage_times(workload, layout, machine, site), layout.micro_batches(workload)
    length = pipeline_seconds(stages, layout.pp, micro_batches, layout.schedule)
    outside = sum(prediction.time[name] for name in ("pipeline_transfer", "data_parallel", "optimizer"))
    step = length + outside + site.step_overhead_s
    bubble = prediction.time["bubble"] + step - prediction.step_seconds
    factor = prediction.step_seconds / step
    low, high = prediction.interval
    return replace(
        prediction,
        step_seconds=step,
        tokens_per_second_per_device=prediction.tokens_per_second_per_device * factor,
        tflops=prediction.tflops * factor,
        mfu=prediction.mfu * factor,
        time={**prediction.time, "bubble": bubble},
        interval=(low / factor, high / factor),
    )


def stage_times(workload: Workload, layout: Layout, machine: Machine, site: Site) -> list[StageTimes]:
    """Seconds of one micro-batch through each of pp * vpp stages in the model's order."""
    w = work_of(workload)
    costs = rank_seconds(w, table_of([layout], w.layers), hardware_for(machine, workload, site), site)
    forward, backward, weight = (float(np.broadcast_to(value, (1,))[0]) for value in costs[:3])
    ends = costs[3]
    counts = stage_layers(layout, workload.layers)
    times = [StageTimes(count * forward, count * backward, count * weight) for count in counts]
    third = 1.0 / 3.0  # ends do their work as layers do: one part forward, two backward
    for stage, extra in ((0, float(ends.first[0])), (-1, float(ends.last[0]))):
        held = times[stage]
        times[stage] = StageTimes(
            held.forward + extra * third, held.backward + 2 * extra * third, held.weight + extra * third
        )
    return times


def balance_layers(workload: Workload, layout: Layout, machine: Machine, site: Site) -> tuple[int, ...]:
    """Layers of each rank such that the slowest rank is as fast as can be, given what the ends do besides.

    Exact: layers are alike, so each next one goes to the rank that it delays least.
    """
    w = work_of(workload)
    forward, backward, _, ends = rank_seconds(
        w, table_of([layout], w.layers), hardware_for(machine, workload, site), site
    )
    each = float(np.broadcast_to(forward + backward, (1,))[0])
    extra = [0.0] * layout.pp
    extra[0] += float(ends.first[0])
    extra[-1] += float(ends.last[0])
    return min_max_split(workload.layers, [each] * layout.pp, extra)


def min_max_split(
    layers: int, each: Sequence[float], extra: Sequence[float], most: Sequence[int] = ()
) -> tuple[int, ...]:
    """Share `layers` over stages with these seconds a layer and besides, so that the slowest stage is fastest.

    `most` bounds what a stage can hold. Empty when they cannot all be placed.
    """
    counts = [0] * len(each)
    limits = list(most) or [layers] * len(each)
    for _ in range(layers):
        free = [stage for stage in range(len(each)) if counts[stage] < limits[stage]]
        if not free:
            return ()
        chosen = min(free, key=lambda stage: (extra[stage] + (counts[stage] + 1) * each[stage], stage))
        counts[chosen] += 1
    return tuple(counts)
