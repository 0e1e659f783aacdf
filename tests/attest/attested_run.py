"""One tiny run that kept its chain, with a process that died in the middle, and the release made of it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_tiny_recipe

from anychip.attest.check.signatures import PublicKey
from anychip.attest.keys import load_key, make_key
from anychip.attest.release import make_release
from anychip.attest.sign import add_signature
from anychip.rundir import RunDirectory
from anychip.stages import open_run, run_stage
from anychip.train import loop

STEPS = 12
ATTEST = ("attest.allow_vendors=[cpu]", "attest.record=true", "model.hidden_dropout=0.1")


class Died(RuntimeError):
    """Stands for a process that was killed: nothing is saved."""


@dataclass(frozen=True)
class Attested:
    """A run, its release, and the keys of those who signed it; `stranger` did not."""

    run: RunDirectory
    release: Path
    keys: dict[str, Path]

    def public(self, *roles: str) -> dict[str, list[PublicKey]]:
        """What a verifier is given who trusts these."""
        return {role: [load_key(self.keys[role]).public] for role in roles}


def train(recipe: Path, runs: Path, *overrides: str, die_at: int = 0) -> RunDirectory:
    """Data and pretraining in this process; with `die_at`, it dies before that step counts."""
    opened = open_run(recipe, [*ATTEST, "training.eval_interval=0", *overrides], runs)
    run_stage("data", *opened)
    real, calls = loop.train_step, 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise Died
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "measure_matmul_flops", lambda *_: None)  # a third of a second a start
        if die_at:
            patch.setattr(loop, "train_step", dying)
        with pytest.raises(Died) if die_at else nullcontext():
            run_stage("train", *opened)
    return opened[1]


def finish(recipe: Path, runs: Path, *overrides: str) -> RunDirectory:
    """The stages after training."""
    opened = open_run(recipe, [*ATTEST, "eval.baselines=false", *overrides], runs)
    for stage in ("eval", "export"):
        run_stage(stage, *opened)
    return opened[1]


def make_attested(folder: Path) -> Attested:
    recipe, runs = write_tiny_recipe(folder), folder / "runs"
    train(recipe, runs, die_at=8)
    run = train(recipe, runs)
    finish(recipe, runs)
    keys = {role: folder / f"{role}.pem" for role in ("operator", "data-owner", "chip-vendor", "stranger")}
    for role, path in keys.items():
        make_key(path, "ed25519" if role == "data-owner" else "ecdsa")
    release = make_release(run, folder / "release", keys["operator"])
    for role in ("data-owner", "chip-vendor"):
        add_signature(release, role, load_key(keys[role]))
    return Attested(run, release, keys)
