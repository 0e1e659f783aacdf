"""The event simulation gives the textbook lengths of every schedule, and timelines without contradictions."""

from __future__ import annotations

from itertools import pairwise

import pytest

from anychip.plan.pipeline import StageTimes, pipeline_seconds, simulate_pipeline
from anychip.plan.types import SCHEDULES, Schedule, Timeline

FORWARD, BACKWARD, WEIGHT = 1.0, 2.0, 1.0


def stages(count: int, chunks: int = 1) -> list[StageTimes]:
    return [StageTimes(FORWARD / chunks, BACKWARD / chunks, WEIGHT / chunks)] * (count * chunks)


def run(schedule: Schedule, ranks: int, batches: int, chunks: int = 1) -> Timeline:
    return simulate_pipeline(stages(ranks, chunks), ranks, batches, schedule)


@pytest.mark.parametrize(("ranks", "batches"), [(1, 3), (2, 4), (4, 8), (8, 16), (4, 3)])
def test_even_stages_take_the_textbook_bubble(ranks: int, batches: int) -> None:
    whole = FORWARD + BACKWARD
    for schedule in ("gpipe", "1f1b"):
        assert run(schedule, ranks, batches).seconds == pytest.approx((batches + ranks - 1) * whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_divide_the_bubble(chunks: int) -> None:
    assert run("interleaved", 4, 8, chunks).seconds == pytest.approx(8 * 3 + 3 * 3 / chunks)


def test_zero_bubble_fills_the_bubble_with_weight_gradients() -> None:
    assert run("zero_bubble", 4, 16).seconds == pytest.approx(16 * 3 + 3 * (3 - 2 * WEIGHT))
    assert run("dualpipe_v", 4, 16, 2).seconds == pytest.approx(16 * 3 + 3 * (3 - 2 * WEIGHT) / 2)


def test_an_uneven_pipeline_waits_for_its_slowest_stage() -> None:
    uneven = [StageTimes(1, 2), StageTimes(2, 4), StageTimes(1, 2)]
    seconds = simulate_pipeline(uneven, 3, 6, "1f1b").seconds
    assert 6 * 6 < seconds <= (6 - 1) * 6 + 3 + 6 + 3  # the closed form is an upper bound


def test_sending_takes_time_on_the_way_in_and_out() -> None:
    assert simulate_pipeline(stages(4), 4, 1, "1f1b", 0.5).seconds == pytest.approx(4 * 3 + 2 * 3 * 0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_timelines_are_possible(schedule: Schedule) -> None:
    chunks = {"interleaved": 2, "zero_bubble": 2, "dualpipe_v": 2}.get(schedule, 1)
    ranks, batches = 3, 6
    timeline = run(schedule, ranks, batches, chunks)
    kinds = 3 if schedule in ("zero_bubble", "dualpipe_v") else 2
    assert len(timeline.events) == ranks * chunks * batches * kinds
    for rank in range(ranks):
        own = sorted((event for event in timeline.events if event.stage == rank), key=lambda event: event.start)
        assert all(later.start >= earlier.end - 1e-9 for earlier, later in pairwise(own))
    done = {(event.stage, event.chunk, event.micro_batch, event.kind): event for event in timeline.events}
    for (rank, chunk, batch, kind), event in done.items():
        if kind == "backward":
            assert event.start >= done[rank, chunk, batch, "forward"].end - 1e-9
        if kind == "weight":
            assert event.start >= done[rank, chunk, batch, "backward"].end - 1e-9
    assert 0 <= timeline.bubble_fraction < 1


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "interleaved"])
def test_long_runs_are_extended_exactly(schedule: Schedule) -> None:
    chunks = 2 if schedule == "interleaved" else 1
    given = stages(4, chunks)
    exact = simulate_pipeline(given, 4, 64, schedule).seconds
    assert pipeline_seconds(given, 4, 64, schedule) == pytest.approx(exact)
