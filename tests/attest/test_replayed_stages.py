"""Steps of models that grew, of tuning and of several processes, computed again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from attested_run import ATTEST, train
from rank_pool import run_ranks
from tiny_run import write_tiny_recipe

from anychip.attest.check.findings import Findings
from anychip.attest.check.history import History
from anychip.attest.release import history_of_run
from anychip.attest.replay import replay_steps
from anychip.rundir import RunDirectory
from anychip.stages import open_run, run_stage

ALL = 100
SHARDED = ("parallel.data_parallel_shard=2", "training.steps=6", "checkpoint.asynchronous=false")


def replayed(run: RunDirectory) -> Findings:
    history, findings = history_of_run(run), Findings()
    assert history.findings.problems == []
    replay_steps(run, history, ALL, 0, findings)
    return findings


@pytest.mark.parametrize("mode", ["immediate", "masked"])
def test_a_model_that_grew_comes_out_to_the_last_bit(tmp_path: Path, mode: str) -> None:
    growth = f"{{at_tokens: 768, mode: {mode}, layers: even, to: {{num_hidden_layers: 3, intermediate_size: 96}}}}"
    run = train(write_tiny_recipe(tmp_path), tmp_path / "runs", f"grow=[{growth}]", "optimizer.name=adamw")
    findings = replayed(run)
    assert findings.problems == []
    assert "12 steps chosen at random among steps 1 to 12 of pretrain" in findings.shown[0]
    assert "12 of them to the last bit" in findings.shown[0]


def tuned(folder: Path, reference: str) -> RunDirectory:
    """Pretrained, then tuned with adapters, then on preferences."""
    rows = [{"instruction": f"what is {n}?", "output": f"the number {n}"} for n in range(24)]
    pairs = [{"prompt": f"what is {n}?", "chosen": f"it is {n}", "rejected": "no"} for n in range(24)]
    for name, lines in (("d", rows), ("p", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    few = "steps: 2, seq_length: 48"
    overrides = [
        f"tune.sft={{sources: [{{path: {folder}/d.jsonl}}], {few}, lora: {{rank: 2}}}}",
        f"tune.dpo={{sources: [{{path: {folder}/p.jsonl}}], {few}, reference: {reference}}}",
    ]
    opened = open_run(write_tiny_recipe(folder, steps=3, eval_interval=0), [*ATTEST, *overrides], folder / "runs")
    for stage in ("data", "train", "sft", "dpo"):
        run_stage(stage, *opened)
    return opened[1]


@pytest.fixture(scope="module")
def tuned_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return tuned(tmp_path_factory.mktemp("tuned"), "on_the_fly")


def test_tuned_steps_come_out_to_the_last_bit(tuned_run: RunDirectory) -> None:
    findings = replayed(tuned_run)
    assert findings.problems == []
    assert "among steps 1 to 3 of pretrain, steps 1 to 2 of sft, steps 1 to 2 of dpo" in findings.shown[0]
    assert "7 of them to the last bit" in findings.shown[0]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_number_of_tuning_that_was_never_computed_is_found(
    tuned_run: RunDirectory, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = {
        link["body"]["trace"]
        for link in history_of_run(tuned_run).links
        if link["kind"] == "claim" and link["body"]["stage"] == stage
    }
    real = History.lookup

    def changed(history: History, digest: str, what: str) -> Any:
        found = real(history, digest, what)
        return {**found, "losses": [1.01 * loss for loss in found["losses"]]} if digest in traces else found

    monkeypatch.setattr(History, "lookup", changed)
    found = replayed(tuned_run).problems
    assert [problem.reason for problem in found] == ["steps"] * 2
    assert all(f"of {stage}, computed again, has loss" in problem.what for problem in found)


def test_a_reference_computed_beforehand_is_computed_again(tmp_path: Path) -> None:
    run = tuned(tmp_path, "precomputed")
    kept = run.dpo / "reference.safetensors"
    kept.write_bytes(bytes(kept.stat().st_size))  # what training kept of it is not believed
    assert replayed(run).problems == []


def test_without_the_weights_that_tuning_began_with_it_is_not_computed_again(tuned_run: RunDirectory) -> None:
    weights, away = tuned_run.checkpoints, tuned_run.root / "away"
    weights.rename(away)
    try:
        assert "sft" not in replayed(tuned_run).shown[0]
    finally:
        away.rename(weights)


def _train_in_rank(folder: Path) -> None:
    run_stage("train", *open_run(folder / "tiny.yaml", [*ATTEST, *SHARDED], folder / "runs"))


def _replay_in_rank(folder: Path) -> None:
    found = replayed(RunDirectory(folder / "runs" / "tiny"))
    told = [found.shown, found.not_shown, [problem.what for problem in found.problems]]
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(told))


@pytest.mark.timeout(300)
def test_several_processes_give_the_same_bits_and_one_nearly_the_same_numbers(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path, eval_interval=0)
    opened = open_run(recipe, [*ATTEST, *SHARDED], tmp_path / "runs")
    run_stage("data", *opened)
    run_ranks(2, _train_in_rank, tmp_path, tmp_path)
    run_ranks(2, _replay_in_rank, tmp_path, tmp_path)
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first[2] == []
    assert "6 of them to the last bit" in first[0][0]
    alone = replayed(opened[1])
    assert alone.problems == [] and "6 steps chosen" in alone.shown[0]
    assert any("pretrain was trained by" in text and "less than 0.0001" in text for text in alone.not_shown)
