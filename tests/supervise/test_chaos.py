"""Faults of every kind, and nothing to be seen of them in what comes out. A thousand: see the page on recovery."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import finish, write_tiny_recipe
from typer.testing import CliRunner

from anychip.cli import app
from anychip.errors import InputError
from anychip.recipe import Recipe, load_recipe
from anychip.rundir import RunDirectory
from anychip.supervise.chaos import Chaos, chaos
from anychip.supervise.chaos.disks import damaged_tokens
from anychip.supervise.chaos.history import History, Teller
from anychip.supervise.chaos.inside import Wishes, flip
from anychip.supervise.chaos.invariants import broken_invariants
from anychip.supervise.chaos.schedule import kinds, left_out, schedule

SETTINGS = [
    "training.eval_interval=0",
    "checkpoint.save_interval=3",
    "checkpoint.keep=4",
    "checkpoint.memory_interval=2",
    "guard.digest_interval=1",
    "log.interval=3",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_tiny_recipe(tmp_path_factory.mktemp("recipe")), SETTINGS)


def test_a_seed_is_a_schedule(recipe: Recipe) -> None:
    weights = kinds(recipe, 2, networks=True)
    assert schedule(7, 50, 4, weights) == schedule(7, 50, 4, weights) != schedule(8, 50, 4, weights)
    assert {fault.rank for fault in schedule(7, 200, 4, weights)} == set(range(4))


@pytest.mark.parametrize(("hosts", "networks"), [(1, False), (2, False), (2, True)])
def test_every_kind_strikes(recipe: Recipe, hosts: int, networks: bool) -> None:
    weights = kinds(recipe, hosts, networks)
    assert {fault.kind for fault in schedule(3, len(weights), 4, weights)} == set(weights)


def test_kinds_need_what_they_strike(recipe: Recipe) -> None:
    assert "kill_agent" not in kinds(recipe, 1, networks=False)
    assert "kill_supervisor" not in kinds(recipe, 2, networks=True)
    assert ("partition" in kinds(recipe, 2, networks=False), "partition" in kinds(recipe, 2, networks=True)) == (
        False,
        True,
    )
    assert left_out(recipe) == []


def test_what_a_recipe_does_not_let_strike_is_said(tmp_path: Path) -> None:
    recipe = load_recipe(write_tiny_recipe(tmp_path), ["guard.on_damaged_data=skip"])
    assert not {"flip_in_memory", "damaged_data"} & kinds(recipe, 1, networks=False).keys()
    assert len(left_out(recipe)) == 3


def test_a_model_that_grows_is_refused(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    with pytest.raises(InputError, match="several histories"):
        chaos(load_recipe(demo, []), demo, [], tmp_path, processes=2, seed=1, faults=1)


# What comes of it

RESULT = Chaos(
    seed=1,
    drawn_from=("kill",),
    left_out=(),
    struck={"kill": 12},
    unmet=0,
    planned=12,
    step=90,
    steps=100,
    failed_saves=0,
    generations=13,
    facts=1,
    seconds=1.0,
    broken=(),
)


@pytest.mark.parametrize(
    ("result", "code", "said"),
    [
        (RESULT, 0, "12 of 12 faults struck"),
        (replace(RESULT, broken=("a step was lost",)), 3, "BROKEN: a step was lost"),
        (replace(RESULT, planned=1000), 3, "Raise training.steps from 100 to about 10000"),
    ],
)
def test_only_a_whole_schedule_without_a_trace_is_a_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: Chaos, code: int, said: str
) -> None:
    monkeypatch.setattr("anychip.supervise.chaos.chaos", lambda *_: result)
    done = CliRunner().invoke(app, ["chaos", str(write_tiny_recipe(tmp_path))])
    assert (done.exit_code, said in done.output) == (code, True), done.output


# The history

Row = dict[str, Any]


def row(what: str, step: int, rank: int = 0, generation: int = 1, **more: Any) -> Row:
    return {"what": what, "step": step, "rank": rank, "generation": generation, "pid": 10 * generation + rank, **more}


def start(generation: int, step: int, source: str = "disk") -> list[Row]:
    found = []
    for rank in (0, 1):
        state = {"boxes": f"{step:064x}" if step else "", "extra": "e" if step else ""}
        found += [row("began", 0, rank, generation)]
        found += [row("restored", step, rank, generation, source=source if step else "nothing", **state)]
    return found


def steps(generation: int, first: int, last: int) -> list[Row]:
    made = []
    for step in range(first, last + 1):
        for rank in (0, 1):
            made.append(row("step", step, rank, generation, batch=f"b{step}", loss=1 / step, applied=True))
        if step % 3 == 0:
            saved = {"boxes": f"{step:064x}", "extra": "e"}
            made += [row(what, step, 0, generation, **saved) for what in ("claims", "commits")]
    return made


def copy(generation: int, step: int, boxes: int | None = None) -> list[Row]:
    total = step if boxes is None else boxes
    parts = [
        row("part", step, r, generation, attempt=f"{generation}-{step}", world_size=2, boxes=f"{n:064x}", extra="e")
        for r, n in ((0, 1), (1, total - 1))
    ]
    return [*parts, *(row("copied", step, r, generation, attempt=f"{generation}-{step}") for r in (0, 1))]


CALM = [*start(1, 0), *steps(1, 1, 8)]
GOOD = [
    *start(1, 0),
    *steps(1, 1, 4),
    *copy(1, 4)[:2],
    *start(2, 4, "memory"),
    *steps(2, 5, 7),
    row("damaged", 6),
    *start(3, 3),
    *steps(3, 4, 8),
]


def test_a_good_history_is_good() -> None:
    assert broken_invariants(CALM, GOOD, 8) == []


def lost_step(rows: list[Row]) -> None:
    rows.remove(next(r for r in rows if r["what"] == "step" and r["step"] == 8))


def other_batch(rows: list[Row]) -> None:
    next(r for r in rows if r["what"] == "step" and r["step"] == 2)["batch"] = "another"


def other_loss(rows: list[Row]) -> None:
    next(r for r in rows if r["what"] == "step" and r["step"] == 2)["loss"] = 0.123


def step_twice(rows: list[Row]) -> None:
    at = next(n for n, r in enumerate(rows) if r["what"] == "step" and r["step"] == 2)
    rows.insert(at, dict(rows[at]))


def late_commit(rows: list[Row]) -> None:
    rows.append(row("commits", 9, 0, 2, boxes="", extra=""))


def two_writers(rows: list[Row]) -> None:
    rows.append(row("claims", 9, 1, 3, boxes="", extra=""))


def saved_backwards(rows: list[Row]) -> None:
    rows.append(row("claims", 3, 0, 3, boxes=f"{3:064x}", extra="e"))


def other_state(rows: list[Row]) -> None:
    next(r for r in rows if r["what"] == "claims")["extra"] = "another guard"


def other_copy(rows: list[Row]) -> None:
    next(r for r in rows if r["what"] == "part")["boxes"] = f"{77:064x}"


def unknown_state(rows: list[Row]) -> None:
    for r in rows:
        if r["what"] == "restored" and r["generation"] == 3:
            r["boxes"] = f"{99:064x}"


def older_state(rows: list[Row]) -> None:
    rows.remove(next(r for r in rows if r["what"] == "damaged"))


def different_states(rows: list[Row]) -> None:
    rows.remove(next(r for r in rows if r["what"] == "restored" and r["generation"] == 3 and r["rank"] == 1))
    rows.insert(-1, row("restored", 0, 1, 3, source="nothing", boxes="", extra=""))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lost_step, "ended with"),
        (other_batch, "read another batch in step 2"),
        (other_loss, "had another loss in step 2"),
        (step_twice, "made step 2 after step 2"),
        (late_commit, "after generation 3 had begun"),
        (two_writers, "two processes of generation 3"),
        (saved_backwards, "published step 3 after step 6"),
        (other_state, "another state of step 3"),
        (other_copy, "that was never saved"),
        (unknown_state, "a state of step 3 that was never saved"),
        (older_state, "restored step 3 though step 6 was there"),
        (different_states, "restored different states"),
    ],
)
def test_a_broken_history_is_found(change: Callable[[list[Row]], None], said: str) -> None:
    rows = [dict(r) for r in GOOD]
    change(rows)
    broken = broken_invariants(CALM, rows, 8)
    assert any(said in text for text in broken), broken


def test_a_copy_counts_until_both_hosts_that_hold_it_are_lost() -> None:
    lost = {"what": "forgot", "host": 0}
    begun = [*start(1, 0), *steps(1, 1, 4), *copy(1, 4)]
    again = [*start(2, 3), *steps(2, 4, 8)]
    assert any("though step 4 was there" in text for text in broken_invariants(CALM, [*begun, lost, *again], 8))
    assert broken_invariants(CALM, [*begun, lost, lost, *again], 8) == []


def test_what_was_told_is_in_the_history(tmp_path: Path) -> None:
    folder = tmp_path / "history"
    with History(folder) as history:
        tellers = [Teller(folder, rank=rank) for rank in (0, 1)]
        for step in range(2000):
            tellers[step % 2].tell("step", step=step)
    assert history.rows() == [{"what": "step", "rank": step % 2, "step": step} for step in range(2000)]


def test_without_a_listener_nobody_waits(tmp_path: Path) -> None:
    with History(tmp_path / "history"):
        pass
    with pytest.raises(OSError):
        Teller(tmp_path / "history")
    os.mkfifo(tmp_path / "history" / "pipe")
    with pytest.raises(OSError):
        Teller(tmp_path / "history")


# Injuries


def test_a_wish_is_granted_once(tmp_path: Path) -> None:
    with History(tmp_path / "history") as history:
        wishes = Wishes(tmp_path / "wish-0", Teller(tmp_path / "history"))
        (tmp_path / "wish-0").write_text("fail at open EIO")
        wishes.strike_at("write")
        with pytest.raises(OSError, match=os.strerror(5)):
            wishes.strike_at("open")
        wishes.strike_at("open")
    assert history.rows() == [{"what": "hurt", "wish": "fail at open EIO"}]


@pytest.mark.parametrize("number", [0, 37, 200, 12345])
def test_a_flip_changes_one_bit_of_one_tensor(number: int) -> None:
    state = {"a": torch.zeros(3), "b": torch.zeros(2, 2), "step": torch.tensor(1.0)}
    flip(state, number)
    words = torch.cat([tensor.reshape(-1).view(torch.uint8) for name, tensor in state.items() if name != "step"])
    assert [bin(word).count("1") for word in words.tolist() if word] == [1]
    assert state["step"] == 1


def test_damaged_tokens_are_restored_and_open_files_stay_good(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (run.data / "train").mkdir(parents=True)
    path = run.data / "train" / "words.bin"
    path.write_bytes(good := bytes(300_000))
    with path.open("rb") as held, damaged_tokens(run, 77) as names:
        assert (names, held.read() == good) == (["words.bin"], True)
        assert sum(byte != 0 for byte in path.read_bytes()) == 3
    assert path.read_bytes() == good
    assert [each.name for each in path.parent.iterdir()] == ["words.bin"]


# All of it


def run(folder: Path, *options: str, steps: int) -> str:
    write_tiny_recipe(folder)
    words = [word for setting in [*SETTINGS, f"training.steps={steps}"] for word in ("--set", setting)]
    return finish(folder, "chaos", "tiny.yaml", *options, *words, timeout=1750)


@pytest.mark.timeout(1800)
def test_thirty_faults_leave_no_trace(tmp_path: Path) -> None:
    """Every kind of one host among them."""
    out = run(tmp_path, "--seed", "5", "--faults", "30", steps=800)
    assert "Every invariant held" in out
    assert "30 of 30 faults struck" in out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faults_on_two_hosts_leave_no_trace(tmp_path: Path) -> None:
    """Every kind of several hosts among them."""
    out = run(tmp_path, "--hosts", "2", "--faults", "24", steps=500)
    assert "Every invariant held" in out
