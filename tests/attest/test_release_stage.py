"""`attest.key`: a run ends with a release, and the key is there before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_run import write_tiny_recipe

from anychip.attest.check.release import check_release
from anychip.attest.check.signatures import load_public_key
from anychip.attest.keys import make_key
from anychip.errors import InputError
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.stages import open_run, run_stages


def opened(folder: Path) -> tuple[Recipe, RunDirectory]:
    overrides = ["eval.baselines=false", "training.eval_interval=0", "training.steps=3"]
    return open_run(write_tiny_recipe(folder), [f"attest.key={folder}/operator.pem", *overrides], folder / "runs")


def test_a_run_ends_with_a_release_that_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = opened(tmp_path)
    run_stages(recipe, run)
    told = capsys.readouterr().out
    assert f"attest check {run.release} --operator {tmp_path}/operator.pub.pem" in told
    assert told.index("operator.pem (keep it)") < told.index("data: starts")
    key = load_public_key(tmp_path / "operator.pub.pem")
    findings, _ = check_release(run.release, {"operator": [key]})
    assert findings.problems == []
    run_stages(recipe, run)
    assert "release: done before" in capsys.readouterr().out
    assert load_public_key(tmp_path / "operator.pub.pem").id == key.id


def test_a_key_that_cannot_sign_weights_is_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe, run = opened(tmp_path)
    make_key(tmp_path / "operator.pem", "ed25519")
    with pytest.raises(InputError, match="no ECDSA key"):
        run_stages(recipe, run)
    assert not run.root.exists()


def test_without_the_package_for_keys_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = opened(tmp_path)
    monkeypatch.delitem(sys.modules, "anychip.attest.keys", raising=False)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(InputError, match="package that is missing"):
        run_stages(recipe, run)
    assert not run.root.exists()
