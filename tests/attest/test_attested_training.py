"""The chain of real trainings: deaths, returns to older states, tuning, several processes; and who may take part."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from attested_run import ATTEST, Attested, Died, finish, train
from rank_pool import run_ranks
from tiny_run import write_tiny_recipe
from toy_accelerator import ToyBackend

from anychip.attest import chain as chain_module
from anychip.attest.check.release import check_release
from anychip.attest.keys import load_key
from anychip.attest.release import history_of_run, make_release
from anychip.attest.show import show
from anychip.attest.witness import ChainWitness
from anychip.chips import inventory
from anychip.errors import UnfitError
from anychip.interchange.initialize import init_model
from anychip.rundir import RunDirectory
from anychip.stages import keep_recipe, open_run, run_stage
from anychip.train import loop
from anychip.train.checkpoint import CheckpointStore
from anychip.train.step import StepResult

IN_TURN = "checkpoint.asynchronous=false"


def kinds(run: RunDirectory) -> Counter[str]:
    return Counter(link["kind"] for link in history_of_run(run).links)


def problems(run: RunDirectory) -> list[str]:
    return [problem.what for problem in history_of_run(run).findings.problems]


def release_problems(attested: Attested, run: RunDirectory, folder: Path) -> list[str]:
    """What a third party finds wrong with a release of this run."""
    release = make_release(run, folder / "release", attested.keys["operator"])
    findings, _ = check_release(release, {"operator": [load_key(attested.keys["operator"]).public]})
    return [problem.what for problem in findings.problems]


@pytest.fixture
def data(attested: Attested, tmp_path: Path) -> Path:
    """A folder with the tiny recipe and a run whose data is ready and that has not trained."""
    shutil.copytree(attested.release.parent / "corpus", tmp_path / "corpus")
    recipe = write_tiny_recipe(tmp_path)
    text = recipe.read_text(encoding="utf-8").replace(str(tmp_path / "corpus"), str(attested.release.parent / "corpus"))
    recipe.write_text(text, encoding="utf-8")
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(attested.run.data, run / "data")
    (run / "stages").mkdir()
    shutil.copy(attested.run.stage_marker("data"), run / "stages" / "data.json")
    return tmp_path


def die_before_saving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CheckpointStore, "save", lambda *_: raise_died())


def die_after_saving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChainWitness, "settle", lambda _: raise_died())


def die_while_linking(patch: pytest.MonkeyPatch) -> None:
    real, calls = os.write, 0

    def torn(descriptor: int, line: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls < 3:
            return real(descriptor, line)
        real(descriptor, line[: len(line) // 2])
        raise Died

    patch.setattr(chain_module.os, "write", torn)


def raise_died() -> None:
    raise Died


@pytest.mark.parametrize(("die", "repairs"), [(die_before_saving, 0), (die_after_saving, 1), (die_while_linking, 1)])
def test_wherever_a_process_dies_the_chain_goes_on(data: Path, die: Any, repairs: int) -> None:
    recipe, runs = data / "tiny.yaml", data / "runs"
    with pytest.MonkeyPatch.context() as patch:
        die(patch)
        with pytest.raises(Died):
            train(recipe, runs, IN_TURN)
    run = train(recipe, runs, IN_TURN)
    assert problems(run) == []
    found = kinds(run)
    assert found["start"] == 2 and found["repair"] == repairs
    stored = {link["body"]["claim"] for link in history_of_run(run).links if link["kind"] == "saved"}
    assert len(stored) == 4  # of steps 3, 6, 9 and 12


def test_a_return_to_an_older_state_and_what_was_left_out_are_links(attested: Attested, data: Path) -> None:
    real, calls = loop.train_step, 0

    def spiking(*arguments: Any) -> StepResult:
        nonlocal calls
        calls += 1
        return StepResult(9.9, 99.0, "loss is up", "none") if calls == 8 else real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", spiking)
        run = train(data / "tiny.yaml", data / "runs", "guard.on_bad_step=rollback", IN_TURN)
    assert problems(run) == []
    assert kinds(run)["rollback"] == kinds(run)["guard"] == 1
    claims = [link["body"] for link in history_of_run(run).links if link["kind"] == "claim"]
    assert [claim["skipped"] for claim in claims] == [[], [], [[6, 8]], [[6, 8]]]
    trace = history_of_run(run).lookup(claims[2]["trace"], "")
    assert trace["batches"] == [8, 9, 10]
    finish(data / "tiny.yaml", data / "runs", "guard.on_bad_step=rollback", IN_TURN)
    assert release_problems(attested, run, data) == []
    assert "back to state" in show(run.root) and "step 8: rollback" in show(run.root)


def test_what_the_guard_did_before_a_death_is_linked_by_the_next_start(data: Path) -> None:
    real, calls = loop.train_step, 0

    def skipping(*arguments: Any) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Died
        return StepResult(9.9, 99.0, "loss is up", "none") if calls == 5 else real(*arguments)

    recipe, runs, skip = data / "tiny.yaml", data / "runs", "guard.on_bad_step=skip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", skipping)
        with pytest.raises(Died):
            train(recipe, runs, skip)
    run = train(recipe, runs, skip)
    assert problems(run) == [] and kinds(run)["guard"] == 1


def test_the_manifest_of_a_checkpoint_carries_its_claim(attested: Attested) -> None:
    extra = CheckpointStore(attested.run.checkpoints).open(9).extra["attest"]
    assert extra.keys() >= {"claim", "parent", "from_step", "step", "skipped", "ledger", "trace", "members", "stage"}
    assert history_of_run(attested.run).states[extra["claim"]] == ("pretrain", 9)


def test_equal_batches_have_equal_ledgers_and_losses(data: Path, attested: Attested) -> None:
    """A run that never died records for each stretch what one records that did."""
    run = train(data / "tiny.yaml", data / "runs")
    ours, theirs = (
        [(link["body"]["ledger"], link["body"]["trace"]) for link in history_of_run(r).links if link["kind"] == "claim"]
        for r in (run, attested.run)
    )
    assert ours == theirs and len(set(ours)) == 4


def test_tuned_and_merged_weights_lead_back_to_the_pretrained_ones(attested: Attested, data: Path) -> None:
    rows = [{"instruction": f"what is {n}?", "output": f"the number {n}"} for n in range(24)]
    (data / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pairs = [{"prompt": f"what is {n}?", "chosen": f"it is {n}", "rejected": "no"} for n in range(24)]
    (data / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    overrides = [
        f"tune.sft={{sources: [{{path: {data}/d.jsonl}}], steps: 2, seq_length: 48, lora: {{rank: 2}}}}",
        f"tune.dpo={{sources: [{{path: {data}/p.jsonl}}], steps: 2, seq_length: 48}}",
        "training.steps=3",
    ]
    opened = open_run(data / "tiny.yaml", [*ATTEST, *overrides], data / "runs")
    for stage in ("train", "sft", "dpo", "eval", "export"):
        run_stage(stage, *opened)
    run = opened[1]
    assert problems(run) == []
    assert release_problems(attested, run, data) == []
    history = history_of_run(run)
    assert history.export is not None
    stages = [history.states[state] for state in history.lineage(history.export["state"])]
    assert list(dict.fromkeys(stages)) == [
        ("dpo", 2),
        ("dpo", 0),
        ("sft", 2),
        ("sft", 0),
        ("pretrain", 3),
        ("pretrain", 0),
    ]
    card = (data / "release" / "README.md").read_text(encoding="utf-8")
    assert "- sft: made by sft, at step 2" in card and "- dpo: trained to step 2" in card


def test_weights_from_elsewhere_are_said_to_be_so(attested: Attested, data: Path) -> None:
    opened = open_run(data / "tiny.yaml", ATTEST, data / "runs")
    init_model(*opened)
    keep_recipe(*opened)
    run = train(data / "tiny.yaml", data / "runs")
    finish(data / "tiny.yaml", data / "runs")
    release = make_release(run, data / "release", attested.keys["operator"])
    findings, _ = check_release(release, {"operator": [load_key(attested.keys["operator"]).public]})
    assert findings.problems == []
    assert any("Where the first weights come from" in text for text in findings.not_shown)


def test_a_checkpoint_of_another_history_makes_a_gap(data: Path) -> None:
    recipe, runs = data / "tiny.yaml", data / "runs"
    train(recipe, runs, die_at=8)
    shutil.move(runs / "tiny" / "attest", data / "first")
    train(recipe, runs, die_at=4)
    shutil.copytree(data / "first", runs / "tiny" / "attest", dirs_exist_ok=True)
    run = train(recipe, runs)
    assert kinds(run)["gap"] == 1
    assert any("something is missing" in what for what in problems(run))


# Who may take part


def test_a_chip_that_the_policy_forbids_does_not_begin(data: Path) -> None:
    with pytest.raises(UnfitError, match=r"rank 0 on .* computes on .*: the policy allows only huawei"):
        train(data / "tiny.yaml", data / "runs", "attest.allow_vendors=[Huawei]")
    assert not (data / "runs" / "tiny" / "checkpoints").exists()


def test_another_chip_at_a_later_start_stops_the_run(data: Path) -> None:
    recipe, runs = data / "tiny.yaml", data / "runs"
    train(recipe, runs, die_at=8)
    before = (runs / "tiny" / "attest" / "chain.jsonl").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "detect_backend", ToyBackend)
        with pytest.raises(UnfitError, match=r"computes on .* by Toy Works: the policy allows only cpu"):
            train(recipe, runs)
    assert (runs / "tiny" / "attest" / "chain.jsonl").read_bytes() == before
    assert problems(train(recipe, runs)) == []


def test_a_chip_of_a_country_that_is_not_known_is_not_let_in(data: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "detect_backend", ToyBackend)
        with pytest.raises(UnfitError, match="a country that is not known"):
            train(data / "tiny.yaml", data / "runs", "attest.allow_vendors=[]", "attest.deny_country=[US]")


@pytest.mark.parametrize(
    ("libraries", "installed"),
    [(["/usr/local/cuda/lib64/libcudart.so.12"], []), ([], ["nvidia-cudnn-cu12==9.1.0"]), ([], ["torch==2.9.0+cu128"])],
)
def test_software_for_a_forbidden_chip_stops_the_run(data: Path, libraries: list[str], installed: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inventory, "mapped_libraries", lambda: libraries)
        patch.setattr(inventory, "_installed", lambda: iter(installed))
        with pytest.raises(UnfitError, match=r"has software of NVIDIA .*the policy allows only cpu"):
            train(data / "tiny.yaml", data / "runs")


def _train_in_rank(folder: Path) -> None:
    """First rank 1 computes on a chip of another make: then no rank may begin."""
    opened = open_run(folder / "tiny.yaml", [*ATTEST, IN_TURN], folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(loop, "detect_backend", ToyBackend)
        with pytest.raises(UnfitError, match=r"rank 1 on .* computes on .* by Toy Works"):
            run_stage("train", *opened)
    assert not opened[1].checkpoints.exists()
    run_stage("train", *opened)


@pytest.mark.timeout(300)
def test_all_ranks_are_asked_and_one_that_may_not_take_part_stops_all(data: Path) -> None:
    run_ranks(2, _train_in_rank, data, data)
    run = RunDirectory(data / "runs" / "tiny")
    assert problems(run) == [] and kinds(run)["saved"] == 4
    (start,) = history_of_run(run).starts
    assert [(rank["rank"], rank["vendor"]) for rank in start[2]["ranks"]] == [(0, "cpu"), (1, "cpu")]


def test_a_run_goes_on_from_memory_with_the_state_that_was_claimed_there(data: Path) -> None:
    """Step 4 was never on disk."""
    recipe, runs, memory = data / "tiny.yaml", data / "runs", "checkpoint.memory_interval=2"
    train(recipe, runs, memory, IN_TURN, die_at=6)
    run = train(recipe, runs, memory, IN_TURN)
    assert problems(run) == []
    history = history_of_run(run)
    assert [body["step"] for body, _, _ in history.starts] == [0, 4]
    assert history.starts[1][0]["resumed"] not in history.manifests.values()


def test_a_chain_that_cannot_be_trusted_stops_the_next_start(data: Path) -> None:
    recipe, runs = data / "tiny.yaml", data / "runs"
    run = train(recipe, runs, IN_TURN, die_at=5)
    chain = run.root / "attest" / "chain.jsonl"
    chain.write_bytes(chain.read_bytes().replace(b'"step":3', b'"step":4'))
    with pytest.raises(UnfitError, match="does not follow the one before it"):
        train(recipe, runs, IN_TURN)
