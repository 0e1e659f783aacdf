"""What generations leave: few folders of heartbeats, however often a run was started, and logs of any length."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any, cast

import pytest

from anychip.rundir import RunDirectory
from anychip.supervise.chaos.watching import Sight
from anychip.supervise.processes import Generation, Place, heartbeat_folders, next_number


def begin(run: RunDirectory, first_rank: int = 0) -> Generation:
    place = Place([0], first_rank, first_rank + 1, 0, 1, "127.0.0.1", 1, "x")
    generation = Generation(next_number(run), place, ["/bin/true"], run)
    generation.kill()
    return generation


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_heartbeats_of_generations_long_past_are_removed_and_numbers_go_on(run: RunDirectory) -> None:
    for _ in range(20):
        begin(run)
    assert [folder.name for folder in heartbeat_folders(run)] == [f"generation-{n:04d}" for n in range(5, 21)]
    begin(run, first_rank=1)  # not the first host: that removes for all
    assert len(heartbeat_folders(run)) == 17
    assert next_number(run) == 22


def test_a_restart_is_seen_though_an_old_folder_went(run: RunDirectory) -> None:
    sight = Sight(run, cast(Any, None))
    for _ in range(16):
        begin(run)
    with sight.without_restart("calm"):
        pass
    assert not sight.broken
    with sight.without_restart("a pause"):
        begin(run)
    assert sight.broken == ["a pause led to a restart"]


def test_the_last_lines_are_those_of_this_generation(run: RunDirectory) -> None:
    begin(run)
    log = run.logs / "ranks" / "rank-00000.log"
    with log.open("a") as handle:
        handle.write("of the first\n")
    generation = begin(run)
    assert generation.last_lines(0) == []
    with log.open("a") as handle:
        handle.write("one\n\ntwo\n")
    assert generation.last_lines(0) == ["one", "two"]


def test_the_last_lines_of_a_long_log_cost_no_more_than_those_of_a_short_one(run: RunDirectory) -> None:
    generation = begin(run)
    with (run.logs / "ranks" / "rank-00000.log").open("a") as handle:
        handle.writelines(f"line {number:0100d}\n" for number in range(1 << 17))
    tracemalloc.start()
    lines = generation.last_lines(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [int(line.split()[1]) for line in lines] == list(range((1 << 17) - 15, 1 << 17))
    assert peak < 1 << 20
