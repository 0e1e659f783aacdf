"""Steps computed again give what was recorded, and anything else than what was trained does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attested_run import Attested
from forging import Forgery

from anychip.attest import replay
from anychip.attest.check.findings import Findings
from anychip.attest.check.history import read_history
from anychip.attest.replay import replay_steps
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore

ALL = 12


def replayed(attested: Attested, run: RunDirectory, forgery: Forgery | None = None, count: int = ALL) -> Findings:
    forgery = forgery or Forgery.of(attested.release)
    objects = {Path(name).stem: data for name, data in forgery.files.items() if "/objects/" in name}
    history = read_history(forgery.files["attestation/chain.jsonl"], objects)
    assert history.findings.problems == []
    findings = Findings()
    replay_steps(run, history, count, 0, findings)
    return findings


def test_genuine_steps_come_out_to_the_last_bit(attested: Attested) -> None:
    findings = replayed(attested, attested.run)
    assert findings.problems == []
    assert "12 steps chosen at random among steps 1 to 12 of pretrain (" in findings.shown[0]
    assert "12 of them to the last bit" in findings.shown[0]


def test_chosen_steps_differ_with_the_seed_only(attested: Attested) -> None:
    assert replayed(attested, attested.run, count=2).shown == replayed(attested, attested.run, count=2).shown


@pytest.mark.parametrize("field", ["losses", "grad_norms"])
def test_a_number_that_was_never_computed_is_found(attested: Attested, field: str) -> None:
    forgery = Forgery.of(attested.release)

    def change(trace: Any) -> None:
        trace[field][1] *= 0.99

    claim = forgery.of_kind("claim")[1]["body"]
    claim["trace"] = forgery.replace_object(claim["trace"], change)
    forgery.relink()
    found = replayed(attested, attested.run, forgery).problems
    assert [problem.reason for problem in found] == ["steps"] and "step 5 of pretrain, computed again" in found[0].what


def test_other_batches_than_those_recorded_are_found(attested: Attested) -> None:
    forgery = Forgery.of(attested.release)
    forgery.of_kind("claim")[2]["body"]["ledger"] = "0" * 64
    forgery.relink()
    assert [problem.reason for problem in replayed(attested, attested.run, forgery).problems] == ["data"]


def test_weights_that_this_training_does_not_give_are_found(
    attested: Attested, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the checkpoint at the end of a stretch had been exchanged, and everything hashed and signed anew."""
    real = CheckpointStore.load

    def other(store: CheckpointStore, info: Any, into: dict[str, Any], **keywords: Any) -> None:
        real(store, info, into, **keywords)
        if not any(name.startswith("optimizer.") for name in into):  # not what training goes on from
            into["model.norm.weight"] += 0.1

    monkeypatch.setattr(replay.CheckpointStore, "load", other)
    found = replayed(attested, attested.run).problems
    assert {problem.reason for problem in found} == {"weights"} and "model.norm.weight" in found[0].what


def drop_checkpoints(run: RunDirectory) -> None:
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()


def other_data(run: RunDirectory) -> None:
    tokens = next(run.data.glob("train/*.bin"))
    tokens.write_bytes(bytes(tokens.stat().st_size))


def damaged_checkpoint(run: RunDirectory) -> None:
    for shard in run.checkpoints.glob("*/rank-*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)


@pytest.mark.parametrize("act", [other_data, damaged_checkpoint])
def test_what_is_not_there_any_more_cannot_be_replayed(
    attested: Attested, tmp_path: Path, act: Callable[[RunDirectory], None]
) -> None:
    run = RunDirectory(Path(shutil.copytree(attested.run.root, tmp_path / "run")))
    act(run)
    assert {problem.reason for problem in replayed(attested, run).problems} == {"steps"}


def test_without_checkpoints_the_beginning_can_still_be_replayed(attested: Attested, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(attested.run.root, tmp_path / "run")))
    drop_checkpoints(run)
    findings = replayed(attested, run)
    assert findings.problems == [] and "among steps 1 to 3 of pretrain" in findings.shown[0]
