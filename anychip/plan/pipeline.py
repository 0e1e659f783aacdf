"""What every pipeline rank does when: an event simulation of the schedules that the closed form only sums up.

A schedule is, for each rank, an order of forward, backward and weight-gradient passes of micro-batches through the
rank's model chunks. Passes start when the rank is free and what they need has arrived. Orders follow Megatron-LM
(1F1B, interleaved; arXiv 2104.04473), zero bubble (arXiv 2401.10241) and DualPipe cut in half (arXiv 2412.19437).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anychip.plan.types import Event, Schedule, Timeline
from anychip.recipe.schema import TWO_STAGE_SCHEDULES

Kind = Literal["forward", "backward", "weight"]
Task = tuple[Kind, int, int]  # kind, chunk, micro-batch


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch through one stage (one chunk of one rank)."""

    forward: float
    backward: float  # all of it, weight gradients included
    weight: float = 0.0  # the part that only makes weight gradients


def simulate_pipeline(
    stages: Sequence[StageTimes], ranks: int, micro_batches: int, schedule: Schedule, send_seconds: float = 0.0
) -> Timeline:
    """Run `micro_batches` through `stages`, which lie on `ranks` as the schedule deals them.

    `stages` are in the order of the model, a multiple of `ranks`; two-chunk schedules need twice `ranks`.
    """
    chunks = len(stages) // ranks
    layout = _Stages(ranks, chunks, folded=schedule in TWO_STAGE_SCHEDULES and chunks == 2)
    if schedule in TWO_STAGE_SCHEDULES:
        return _simulate_greedily(stages, layout, micro_batches, send_seconds)
    orders = [_order(schedule, rank, ranks, chunks, micro_batches) for rank in range(ranks)]
    return _simulate_orders(stages, layout, orders, send_seconds)


def pipeline_seconds(
    stages: Sequence[StageTimes], ranks: int, micro_batches: int, schedule: Schedule, send_seconds: float = 0.0
) -> float:
    """Length of the timeline. Long runs are extended from two short ones, because every schedule becomes periodic."""
    short, long = 3 * ranks, 4 * ranks
    if micro_batches <= long:
        return simulate_pipeline(stages, ranks, micro_batches, schedule, send_seconds).seconds
    first = simulate_pipeline(stages, ranks, short, schedule, send_seconds).seconds
    second = simulate_pipeline(stages, ranks, long, schedule, send_seconds).seconds
    return second + (second - first) / (long - short) * (micro_batches - long)


@dataclass(frozen=True)
class _Stages:
    """Where stages lie: dealt round, or in a V whose second half comes back."""

    ranks: int
    chunks: int
    folded: bool

    @property
    def count(self) -> int:
        return self.ranks * self.chunks

    def place(self, stage: int) -> tuple[int, int]:
        """Rank and chunk of a stage."""
        chunk, rank = divmod(stage, self.ranks)
        return (self.ranks - 1 - rank if self.folded and chunk % 2 else rank), chunk

    def stage(self, rank: int, chunk: int) -> int:
        return chunk * self.ranks + (self.ranks - 1 - rank if self.folded and chunk % 2 else rank)


def _order(schedule: Schedule, rank: int, ranks: int, chunks: int, micro_batches: int) -> list[Task]:
    """The fixed order of passes on one rank."""
    if schedule == "gpipe":
        forwards: list[Task] = [("forward", 0, batch) for batch in range(micro_batches)]
        return forwards + [("backward", 0, batch) for batch in range(micro_batches)]
    units = [(chunk, batch) for chunk, batch in _interleaved_units(ranks, chunks, micro_batches)]
    back = [(chunks - 1 - chunk, batch) for chunk, batch in units]
    warm = ranks - rank - 1 if chunks == 1 else (ranks - rank - 1) * 2 + (chunks - 1) * ranks
    warm = min(warm, len(units))
    order: list[Task] = [("forward", *unit) for unit in units[:warm]]
    for ahead, behind in zip(units[warm:], back, strict=False):
        order += [("forward", *ahead), ("backward", *behind)]
    return order + [("backward", *unit) for unit in back[len(units) - warm :]]


def _interleaved_units(ranks: int, chunks: int, micro_batches: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order of forward passes: groups of `ranks` micro-batches go through each chunk."""
    if chunks == 1:
        return [(0, batch) for batch in range(micro_batches)]
    units: list[tuple[int, int]] = []
    for start in range(0, micro_batches, ranks):
        group = range(start, min(start + ranks, micro_batches))
        units += [(chunk, batch) for chunk in range(chunks) for batch in group]
    return units


def _simulate_orders(stages: Sequence[StageTimes], layout: _Stages, orders: list[list[Task]], send: float) -> Timeline:
    """Walk fixed orders; a rank waits for what its next pass needs."""
    done: dict[tuple[Kind, int, int], float] = {}  # (kind, stage, micro-batch) -> when it is finished
    free, position = [0.0] * layout.ranks, [0] * layout.ranks
    events: list[Event] = []
    left = sum(len(order) for order in orders)
    while left:
        moved = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                kind, chunk, batch = order[position[rank]]
                stage = layout.stage(rank, chunk)
                ready = _arrival(kind, stage, batch, layout, done, send)
                if ready is None:
                    break
                start = max(free[rank], ready)
                end = start + (stages[stage].forward if kind == "forward" else stages[stage].backward)
                done[kind, stage, batch] = free[rank] = end
                events.append(Event(rank, chunk, batch, kind, start, end))
                position[rank] += 1
                left -= 1
                moved = True
        assert moved, "the schedule waits for itself"
    return Timeline(tuple(events), max(free), layout.ranks)


def _arrival(
    kind: Kind, stage: int, batch: int, layout: _Stages, done: dict[tuple[Kind, int, int], float], send: float
) -> float | None:
    """When the input of a pass is on its rank; None while it has not been made."""
    if kind == "forward":
        if stage == 0:
            return 0.0
        before, other = done.get(("forward", stage - 1, batch)), stage - 1
    elif stage == layout.count - 1:
        return done.get(("forward", stage, batch))
    else:
        before, other = done.get(("backward", stage + 1, batch)), stage + 1
    if before is None:
        return None
    return before + (send if layout.place(other)[0] != layout.place(stage)[0] else 0.0)


def _simulate_greedily(stages: Sequence[StageTimes], layout: _Stages, micro_batches: int, send: float) -> Timeline:
    """Schedules whose backward pass is cut in two: gradients of inputs first, those of weights where a rank waits.

    A free rank takes, of what has arrived, the earliest backward pass, else the earliest forward pass that its
    activations leave room for, else a weight pass.
    """
    waiting: list[dict[str, list[tuple[float, int, int]]]] = [
        {"forward": [], "backward": [], "weight": []} for _ in range(layout.ranks)
    ]
    free = [0.0] * layout.ranks
    held = [0] * layout.ranks
    room = [_activation_room(rank, layout) for rank in range(layout.ranks)]
    events: list[Event] = []
    first_rank, first_chunk = layout.place(0)
    for batch in range(micro_batches):
        waiting[first_rank]["forward"].append((0.0, batch, first_chunk))
    left = 3 * layout.count * micro_batches
    agenda = [(0.0, rank) for rank in range(layout.ranks)]
    heapq.heapify(agenda)
    while left:
        now, rank = heapq.heappop(agenda)
        if now < free[rank]:
            continue
        task = _choose(waiting[rank], now, held[rank] < room[rank])
        if task is None:
            coming = [item[0] for items in waiting[rank].values() for item in items[:1] if item[0] > now]
            if coming:
                heapq.heappush(agenda, (min(coming), rank))
            continue
        kind, chunk, batch = task
        stage = layout.stage(rank, chunk)
        seconds = stages[stage]
        length = {"forward": seconds.forward, "backward": seconds.backward - seconds.weight, "weight": seconds.weight}
        free[rank] = end = now + length[kind]
        events.append(Event(rank, chunk, batch, kind, now, end))
        left -= 1
        if kind == "weight":
            pass
        elif kind == "backward":
            held[rank] -= 1
            heapq.heappush(waiting[rank]["weight"], (end, batch, chunk))
            if stage > 0:
                _deliver(waiting, agenda, layout, "backward", stage - 1, rank, end, batch, send)
        else:
            held[rank] += 1
            if stage < layout.count - 1:
                _deliver(waiting, agenda, layout, "forward", stage + 1, rank, end, batch, send)
            else:
                heapq.heappush(waiting[rank]["backward"], (end, batch, chunk))
        heapq.heappush(agenda, (end, rank))
    return Timeline(tuple(events), max(free), layout.ranks)


def _activation_room(rank: int, layout: _Stages) -> int:
    """Forward passes a rank may hold: as deep as 1F1B with one chunk, one micro-batch more than the ranks with two."""
    if layout.chunks == 1:
        return layout.ranks - rank
    return 2 * layout.ranks + 1


def _deliver(
    waiting: list[dict[str, list[tuple[float, int, int]]]],
    agenda: list[tuple[float, int]],
    layout: _Stages,
    kind: Kind,
    stage: int,
    sender: int,
    end: float,
    batch: int,
    send: float,
) -> None:
    """Hand a result to the next stage and wake its rank when it arrives."""
    rank, chunk = layout.place(stage)
    arrival = end + (send if rank != sender else 0.0)
    heapq.heappush(waiting[rank][kind], (arrival, batch, chunk))
    heapq.heappush(agenda, (arrival, rank))


def _choose(waiting: dict[str, list[tuple[float, int, int]]], now: float, has_room: bool) -> Task | None:
    """The pass to run now. Forward passes of later chunks come first: they free activations sooner."""
    kinds: tuple[Kind, ...] = ("backward", "forward", "weight")
    for kind in kinds:
        if kind == "forward" and not has_room:
            later = [item for item in waiting[kind] if item[2] > 0 and item[0] <= now]
            if later:  # a micro-batch that already takes room somewhere must go on
                return _take(waiting[kind], max(later, key=lambda item: (item[2], -item[1])), kind)
            continue
        arrived = [item for item in waiting[kind][:8] if item[0] <= now]
        if arrived:
            chosen = max(arrived, key=lambda item: (item[2], -item[1])) if kind == "forward" else min(arrived)
            return _take(waiting[kind], chosen, kind)
    return None


def _take(items: list[tuple[float, int, int]], chosen: tuple[float, int, int], kind: Kind) -> Task:
    items.remove(chosen)
    heapq.heapify(items)
    return kind, chosen[2], chosen[1]
