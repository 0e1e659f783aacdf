"""A job with failures played event by event, to hold the formula of `goodput` to."""

from __future__ import annotations

import heapq

import numpy as np

from anychip.plan.goodput import Reliability


def replay(
    held: Reliability,
    work_seconds: float,
    memory_interval: float,
    copies_a_save: int,
    *,
    repair_seconds: float = 0.0,
    spare_nodes: int = 0,
    seed: int = 0,
) -> float:
    """Seconds that `work_seconds` useful seconds take, once. Copies to memory are `memory_interval` useful seconds
    apart, every `copies_a_save`-th goes to storage too."""
    random = np.random.default_rng(seed)
    segments = max(1, round(work_seconds / memory_interval))
    now, place = 0.0, 0  # `place` counts finished segments
    in_repair: list[float] = []
    while True:
        until = now + random.exponential(1 / held.failures_per_s) if held.failures_per_s else np.inf
        place, now, saved_at = _advance(held, memory_interval, copies_a_save, place, segments, now, until)
        if place >= segments:
            return now
        if random.random() >= held.survives:
            place = place // copies_a_save * copies_a_save
            if saved_at is not None and now - saved_at < held.write_s:
                place = max(0, place - copies_a_save)
            recovery = held.recover_storage_s - held.write_s
        else:
            recovery = held.recover_memory_s
        now = _recover(held, now, recovery, repair_seconds, spare_nodes, in_repair, random)


def _advance(
    held: Reliability, interval: float, copies: int, place: int, segments: int, now: float, until: float
) -> tuple[int, float, float | None]:
    """Work until a failure or the end: the last segment finished, the time, and when storage was last saved to."""
    saved_at = None
    stall = held.stall_memory_s if held.survives else 0.0
    while place < segments:
        saves = (place + 1) % copies == 0
        end = now + interval + stall + (held.stall_storage_s if saves else 0.0)
        if end > until:
            return place, until, saved_at
        now, place = end, place + 1
        saved_at = now if saves else saved_at
    return place, now, saved_at


def _recover(
    held: Reliability, now: float, seconds: float, repair: float, spares: int, in_repair: list[float],
    random: np.random.Generator,
) -> float:  # fmt: skip
    """Replace the node, waiting for a repaired one when no spare is left, and come back; failures start that anew."""
    while True:
        while in_repair and in_repair[0] <= now:
            heapq.heappop(in_repair)
        if repair:
            heapq.heappush(in_repair, now + repair)
            if len(in_repair) > spares:
                now = max(now, heapq.heappop(in_repair))
        failure = random.exponential(1 / held.failures_per_s)
        if failure >= seconds:
            return now + seconds
        now += failure
