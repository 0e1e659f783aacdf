"""A gradient that is wrong before it is summed is found by computing it again elsewhere, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_job import MODEL
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import run_ranks
from test_copies import events, job_in
from test_guard import Tokens

from anychip.data.batch import Batch
from anychip.errors import InputError, UnfitError
from anychip.parallel.tensor import local
from anychip.recipe.schema import CheckpointConfig, GuardConfig
from anychip.train import loop
from anychip.train.checkpoint import CheckpointStore
from anychip.train.loop import run_training
from anychip.train.replay import draw

pytestmark = pytest.mark.timeout(600)  # twenty runs in one start of processes, seconds on an idle machine
WIDER = MODEL.model_copy(update={"num_key_value_heads": 2, "num_hidden_layers": 2})
NAME = "layers.0.mlp.down_proj.weight"
STEPS = 12
EVERY_FOURTH = {"replay_interval": 4}
FOREVER = tuple(range(8, 99))


@dataclass(frozen=True)
class Trial:
    """A run in which, on rank `victim`, the output of a layer's MLP is wrong in these calls of these steps: `bit`
    turned over, or NaN (None). A call is a forward pass; None: all. With another `site` it is a weight or a moment of
    the optimizer whose bit turns over, in memory, during that call."""

    parallel: dict[str, Any] = field(default_factory=dict)
    victim: int = -1
    calls: tuple[int, ...] | None = None
    steps: tuple[int, ...] = (8,)
    bit: int | None = 18
    site: str = "activation"
    guard: dict[str, Any] = field(default_factory=lambda: EVERY_FOURTH)
    batch: int = 4
    poison: int = -1
    left_out: tuple[int, ...] = ()
    ends: str = ""  # what the error says that ends it


def train_all(argument: tuple[Path, dict[str, Trial]]) -> None:
    train_each(argument, train)


def train_each(argument: tuple[Path, dict[str, Any]], train: Callable[[Path, Any], None]) -> None:
    """Trials one after another, each with the step as it is."""
    folder, trials = argument
    torch.set_num_threads(1)
    for name, trial in trials.items():
        real = loop.train_step
        try:
            train(folder / name, trial)
        finally:
            loop.train_step = real


class Source(Tokens):
    """So many rows of each batch, as if the batches left out had never been."""

    def __init__(self, poison: set[int], left_out: tuple[int, ...], rows: int) -> None:
        super().__init__(poison)
        self._left_out, self._rows = left_out, rows

    def batch(self, step: int) -> Batch:
        whole = super().batch(step + len(self._left_out) * (step >= min(self._left_out, default=step + 1)))
        return Batch(whole.input_ids[: self._rows], whole.labels[: self._rows])


def train(folder: Path, trial: Trial) -> None:
    real, step, call = loop.train_step, 0, 0
    memory: dict[str, torch.Tensor] = {}

    def counting(engine: Any, optimizer: Any, processes: Any, *rest: Any) -> Any:
        nonlocal step, call
        if step == 0 and processes.rank == trial.victim:
            layer: Any = next(iter(engine.parts[0].layers))
            layer.mlp.down_proj.register_forward_hook(break_output)
            name = f"exp_avg_sq.{NAME}"
            memory.update(weight=engine.parameters.get(NAME), moment=optimizer.state().get(name))
        step, call = step + 1, 0
        return real(engine, optimizer, processes, *rest)

    def break_output(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal call
        if step in trial.steps and torch.is_grad_enabled() and (trial.calls is None or call in trial.calls):
            place = local(memory.get(trial.site, output).detach()).view(-1)[3:4]
            if trial.bit is None:
                place.fill_(float("nan"))
            else:
                place.view(torch.int32).bitwise_xor_(1 << trial.bit)
        call += 1

    loop.train_step = counting  # type: ignore[assignment]
    source = Source({trial.poison}, trial.left_out, trial.batch)
    job = replace(job_in(folder, trial.parallel), source=source, guard=GuardConfig(**trial.guard), model=WIDER)
    saves = CheckpointConfig(save_interval=4, keep=0, asynchronous=False)
    job = replace(job, global_batch_size=trial.batch, steps=STEPS, checkpoint=saves)
    if not trial.ends:
        run_training(job)
        return
    with pytest.raises((UnfitError, InputError), match=trial.ends):
        run_training(job)


COPIES = {"data_parallel_replicate": 4}
LAYOUTS = {
    "copies": (COPIES, 4),
    "shards": ({"data_parallel_shard": 4}, 4),
    "copies of shards": ({"data_parallel_replicate": 2, "data_parallel_shard": 2}, 4),
    "tensor": ({"data_parallel_replicate": 2, "tensor_parallel": 2}, 2),
    "context": ({"data_parallel_replicate": 2, "context_parallel": 2}, 2),
    "shards and tensor": ({"data_parallel_shard": 2, "tensor_parallel": 2}, 2),
    "pipeline": ({"data_parallel_replicate": 2, "pipeline_parallel": 2}, 4),
}
FOUR = {
    **{
        f"{name}, {kind}": Trial(
            parallel, victim, (len(range(batch // readers)) if kind else 0,), batch=batch, guard=guard
        )
        for name, (parallel, batch) in LAYOUTS.items()
        for readers in [parallel.get("data_parallel_replicate", 1) * parallel.get("data_parallel_shard", 1)]
        for kind, victim, guard in [("plain", -1, {}), ("flip", 3, EVERY_FOURTH)]
    },
    "a pipeline of shards": Trial({"pipeline_parallel": 2, "data_parallel_shard": 2}, ends="guard.replay_interval=0"),
    "wrong when it repeats": Trial(COPIES, 2, (0,)),
    "between samples": Trial(COPIES, 2, steps=(6,)),
    "unsound": Trial(COPIES, 2, steps=FOREVER, guard={"replay_interval": 4, "patience": 3}, ends="rank 2"),
    "weight": Trial(COPIES, 2, (0,), steps=(7,), site="weight"),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run_ranks(4, train_all, (folder, FOUR), folder, timeout=500)
    return folder


def final(folder: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(folder / "checkpoints")
    return {name: tensor.clone() for name, tensor in store.read(store.open(STEPS))}


def assert_same_end(one: Path, other: Path) -> None:
    found, expected = final(one), final(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def ranks_named(folder: Path) -> set[int]:
    return {rank for event in events(folder) for rank in event["ranks"]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_passing_flip_is_found_named_and_leaves_no_trace(four: Path, name: str) -> None:
    """Also: a run with replay ends with the bits of one without."""
    run = four / f"{name}, flip"
    assert_same_end(run, four / f"{name}, plain")
    assert {(event["step"], event["action"]) for event in events(run)} == {(8, "recompute")}
    assert all(event["distance"] > 0 and event["tensor"] and all(event["nodes"]) for event in events(run))
    degrees = LAYOUTS[name][0]
    one_pass = degrees.get("tensor_parallel", 1) * degrees.get("context_parallel", 1)
    assert 3 in ranks_named(run)
    if degrees.get("pipeline_parallel", 1) == 1:  # those that compute a pass together cannot be told apart
        assert {rank // one_pass for rank in ranks_named(run)} == {3 // one_pass}


def test_the_one_that_repeats_wrongly_is_the_one_named(four: Path) -> None:
    assert ranks_named(four / "wrong when it repeats") == {2}
    assert_same_end(four / "wrong when it repeats", four / "copies, plain")


def test_what_happens_between_samples_is_not_seen(four: Path) -> None:
    assert events(four / "between samples") == []


def test_a_chip_that_goes_on_computing_wrongly_ends_the_run_by_name(four: Path) -> None:
    assert {event["action"] for event in events(four / "unsound")} == {"recompute"}
    assert ranks_named(four / "unsound") == {2}


def test_a_wrong_weight_is_mended_and_not_held_against_the_chip_s_arithmetic(four: Path) -> None:
    found = events(four / "weight")
    assert {(event["step"], event["action"], *event["ranks"]) for event in found} == {(8, "repair", 2)}


TWO = {"data_parallel_replicate": 2}
BOTH = {
    "plain": Trial(TWO, guard={}, batch=2),
    "passing": Trial(TWO, 1, (1,), batch=2),
    "unsound": Trial(TWO, 1, steps=FOREVER, guard={"replay_interval": 4, "patience": 2}, batch=2, ends="rank 0|rank 1"),
    "NaN once": Trial(TWO, 1, (0,), (6,), None, guard={}, batch=2),
    "NaN again and again": Trial(
        TWO, 1, None, (6,), None, guard={"on_bad_step": "skip", "digest_interval": 1}, batch=2
    ),
    "shards": Trial({"data_parallel_shard": 2}, guard={}, batch=2),
    "weight in shards": Trial(
        {"data_parallel_shard": 2}, 1, (0,), (9,), site="weight", guard={"digest_interval": 4}, batch=2
    ),
    "poison": Trial(TWO, guard={"explosion": 2.0, "on_bad_step": "rollback"}, batch=2, poison=9),
    "without it": Trial(TWO, guard={}, batch=2, left_out=(8, 9)),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, train_all, (folder, BOTH), folder, timeout=500)
    return folder


def test_two_readers_tell_a_passing_fault_but_not_a_lasting_one(both: Path) -> None:
    assert ranks_named(both / "passing") == {1}
    assert_same_end(both / "passing", both / "plain")
    assert ranks_named(both / "unsound") == {0, 1}


def test_a_number_that_is_none_on_one_rank_changes_no_rank(both: Path) -> None:
    (event,) = events(both / "NaN once")
    assert (event["step"], event["action"]) == (6, "recompute")
    assert_same_end(both / "NaN once", both / "plain")
    (event,) = events(both / "NaN again and again")  # and no copy differed after any step
    assert (event["step"], event["action"]) == (6, "skip")
    assert int(final(both / "NaN again and again")[f"optimizer.step.{NAME}"]) == STEPS - 1


def test_a_shard_without_a_copy_is_compared_with_itself(both: Path) -> None:
    run = both / "weight in shards"
    assert [(event["step"], event["ranks"], event["action"]) for event in events(run)] == [(9, [1], "reload")]
    assert events(run)[0]["tensor"] == f"model.{NAME}"
    assert_same_end(run, both / "shards")


def test_the_documents_of_a_spike_are_named_once_and_left_out(both: Path) -> None:
    (event,) = events(both / "poison")
    assert (event["step"], event["batch"], event["documents"], event["action"]) == (10, 9, ["book-9"], "rollback")
    assert_same_end(both / "poison", both / "without it")


@pytest.mark.parametrize("site", ["weight", "moment"])
@pytest.mark.parametrize(("step", "seen"), [(9, True), (6, False)])
def test_one_process_sees_memory_that_changed_after_a_comparison(
    tmp_path: Path, site: str, step: int, seen: bool
) -> None:
    """Between other updates nothing watches: that is what one copy costs."""
    train_all((tmp_path, {"run": Trial({}, 0, (0,), (step,), site=site, guard={"digest_interval": 4})}))
    assert [event["action"] for event in events(tmp_path / "run")] == ["reload"] * seen


def test_one_process_repeats_its_own_passes(tmp_path: Path) -> None:
    own = 1 + draw("copies", 8, 4, 1).number  # its call, after the repeated one
    train_all((tmp_path, {"plain": Trial(guard={}), "hit": Trial({}, 0, (own,))}))
    assert ranks_named(tmp_path / "hit") == {0}
    assert_same_end(tmp_path / "hit", tmp_path / "plain")


@pytest.mark.parametrize(("bit", "seen"), [(3, False), (29, True)])
def test_a_tolerance_forgives_small_differences_only(tmp_path: Path, bit: int, seen: bool) -> None:
    own, guard = 1 + draw("copies", 8, 4, 1).number, {"replay_interval": 4, "replay_tolerance": 1e-4}
    train_all((tmp_path, {"run": Trial({}, 0, (own,), bit=bit, guard=guard)}))
    assert bool(events(tmp_path / "run")) == seen


@given(st.text(max_size=9), st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 40))
def test_a_sample_names_other_readers(key: str, step: int, passes: int, readers: int) -> None:
    sample = draw(key, step, passes, readers)
    assert sample == draw(key, step, passes, readers)
    assert 0 <= sample.number < passes
    assert len({0, sample.shift, sample.second_shift}) == min(readers, 3)


def test_samples_reach_every_pass_and_every_pair() -> None:
    samples = [draw("key", step, 4, 5) for step in range(400)]
    assert {sample.number for sample in samples} == set(range(4))
    assert {sample.shift for sample in samples} == set(range(1, 5))
