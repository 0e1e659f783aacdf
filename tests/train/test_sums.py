"""A gradient that changes between backward and the update is found where it is added up, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import run_ranks
from test_copies import events, job_in
from test_replay import COPIES, NAME, STEPS, WIDER, assert_same_end, train_each

from anychip.parallel.layout import Layout
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local
from anychip.recipe.schema import CheckpointConfig, GuardConfig, ParallelConfig
from anychip.train import loop
from anychip.train.engine import Engine
from anychip.train.loop import run_training
from anychip.train.sums import SumCheck

pytestmark = pytest.mark.timeout(600)
STRUCK = 8


@dataclass(frozen=True)
class Trial:
    """A run in whose eighth step a bit of the largest element of a gradient turns over on ranks `victims`: `when` it
    lies in memory, is on its way into the sum, or is the sum."""

    when: str
    victims: tuple[int, ...]
    parallel: dict[str, Any] = field(default_factory=lambda: COPIES)
    bit: int = 23
    guard: dict[str, Any] = field(default_factory=lambda: {"replay_interval": 4})


def train_all(argument: tuple[Path, dict[str, Trial]]) -> None:
    train_each(argument, train)


def train(folder: Path, trial: Trial) -> None:
    real, step, struck = loop.train_step, 0, False

    def counting(engine: Any, optimizer: Any, processes: Any, *rest: Any) -> Any:
        nonlocal step
        if step == 0 and processes.rank in trial.victims:
            arm(engine)
        step += 1
        return real(engine, optimizer, processes, *rest)

    def arm(engine: Any) -> None:
        passes, add_up = engine._run_passes, engine._sum_gradients

        def run_passes(batch: Any, rows: Any, *watch: Any) -> Any:
            total = passes(batch, rows, *watch)
            if watch:  # the step itself, not what is repeated of another's
                strike(engine, "in memory")
            return total

        def sum_gradients() -> None:
            strike(engine, "on its way")
            add_up()
            strike(engine, "sum")

        engine._run_passes, engine._sum_gradients = run_passes, sum_gradients

    def strike(engine: Any, when: str) -> None:
        nonlocal struck
        if step != STRUCK or when != trial.when or struck:
            return
        struck = True
        flat = local(engine.parameters[NAME].grad).view(-1)
        at = int(flat.abs().argmax())
        flat[at : at + 1].view(torch.int32).bitwise_xor_(1 << trial.bit)

    loop.train_step = counting  # type: ignore[assignment]
    saves = CheckpointConfig(save_interval=4, keep=0, asynchronous=False)
    job = replace(job_in(folder, trial.parallel), guard=GuardConfig(**trial.guard), model=WIDER)
    run_training(replace(job, steps=STEPS, checkpoint=saves))


SHARDS, TENSOR = {"data_parallel_shard": 4}, {"data_parallel_replicate": 2, "tensor_parallel": 2}
EVERYONE = (0, 1, 2, 3)
TRIALS = {
    "in memory": Trial("in memory", (2,)),
    "in memory, lowest bit": Trial("in memory", (2,), bit=0),
    "on its way": Trial("on its way", (2,)),
    "sum of one": Trial("sum", (2,)),
    "sum of all": Trial("sum", EVERYONE),
    "sum of all, below rounding": Trial("sum", EVERYONE, bit=0),
    "a shard's sum": Trial("sum", (2,), SHARDS),
    "matrices apart": Trial("in memory", (3,), TENSOR),
    "nothing": Trial("", ()),
    "nothing, shards": Trial("", (), SHARDS),
    "nothing, matrices apart": Trial("", (), TENSOR),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    run_ranks(4, train_all, (folder, TRIALS), folder, timeout=500)
    return folder


@pytest.mark.parametrize(
    ("name", "ranks", "said", "clean"),
    [
        ("in memory", [2], "changed in memory", "nothing"),
        ("in memory, lowest bit", [2], "changed in memory", "nothing"),
        ("on its way", [0, 1, 2, 3], "are not the sum", "nothing"),
        ("sum of one", [2], "are not the sum", "nothing"),
        ("sum of all", [0, 1, 2, 3], "are not the sum", "nothing"),
        ("a shard's sum", [0, 1, 2, 3], "are not the sum", "nothing, shards"),
        ("matrices apart", [3], "changed in memory", "nothing, matrices apart"),
    ],
)
def test_a_changed_gradient_is_found_named_and_leaves_no_trace(
    runs: Path, name: str, ranks: list[int], said: str, clean: str
) -> None:
    (event,) = events(runs / name)
    assert (event["step"], event["action"], event["ranks"]) == (STRUCK, "recompute", ranks)
    assert said in event["problem"] and event["distance"] > 0
    assert event["tensor"] == NAME
    assert_same_end(runs / name, runs / clean)


@pytest.mark.parametrize("name", ["nothing", "nothing, shards", "nothing, matrices apart"])
def test_rounding_is_no_fault(runs: Path, name: str) -> None:
    assert events(runs / name) == []


def test_what_is_smaller_than_rounding_is_not_seen(runs: Path) -> None:
    assert events(runs / "sum of all, below rounding") == []


@pytest.fixture(scope="module")
def check() -> SumCheck:
    processes = Processes(ParallelConfig(), Layout(), 0, torch.device("cpu"))
    check = SumCheck(Engine(job_in(Path("nowhere"), {}), processes, torch.float32), processes)
    check.make_room(64 * 32)
    return check


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 15), st.data())
def test_sketches_of_parts_add_up_to_the_sketch_of_the_whole(
    check: SumCheck, seed: int, rows: int, columns: int, data: st.DataObject
) -> None:
    whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    cut = data.draw(st.integers(0, rows))
    first, second = whole[:cut], whole[cut:]
    total = check.sketch(first) + check.sketch(second, cut * columns)
    assert torch.allclose(total[0], check.sketch(whole)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.randn(64, 32, generator=g),
        lambda g: torch.randn(1, 32, generator=g).expand(64, 32).contiguous(),  # each row rounds alike
        lambda g: torch.randn(64, 32, generator=g) * 10 ** torch.randn(64, 1, generator=g),
    ],
    ids=["normal", "equal rows", "large and small rows"],
)
def test_sums_of_many_are_within_the_tolerance(
    check: SumCheck, make: Callable[[torch.Generator], torch.Tensor]
) -> None:
    """Sixty-four addends one after the other, which rounds most."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        addends = [make(generator) for _ in range(64)]
        total = torch.zeros(64, 32)
        for addend in addends:
            total = total + addend
        computed = torch.stack([check.sketch(addend) for addend in addends]).sum(0)
        assert not check.distance(computed, check.sketch(total), total, 63)
        assert check.distance(computed, check.sketch(total + 1e-2 * total.abs().max()), total, 63)
