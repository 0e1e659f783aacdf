"""What stages write into the chain beside their training: that they ended, and checkpoints that nobody trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from anychip.attest.chain import Chain
from anychip.attest.place import Place
from anychip.attest.witness import ChainWitness, manifest_digest
from anychip.files import sha256_json
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.train.checkpoint.directory import complete_steps, step_name
from anychip.train.witness import Witness

_STATES = ("start", "claim", "derived")


@contextmanager
def attesting(recipe: Recipe, run: RunDirectory, stage: str, after: str | None = None) -> Iterator[Witness | None]:
    """The witness of a training stage (`pretrain`, `sft`, ...) that begins where the stage `after` ended; None when the
    recipe asks for none."""
    if not recipe.attest.active:
        yield None
        return
    weights = run.stage_checkpoints(after) if after else None
    witness = ChainWitness(recipe, run, stage, weights)
    try:
        yield witness
    finally:
        witness.close()


def record_stage(run: RunDirectory, name: str, record: Mapping[str, Any]) -> None:
    """Say that a stage ended with this record, and which checkpoints it left that were not trained: merged, grown."""
    place = Place(run)
    with Chain(place.chain) as chain:
        known = {link.body["manifest"] for link in chain.links if link.kind in ("saved", "derived")}
        for stage, root in place.checkpoint_roots().items():
            for step in complete_steps(root):
                manifest = manifest_digest(root / step_name(step))
                if manifest is not None and manifest not in known:
                    _derive(chain, stage, step, manifest, name)
        chain.append("stage", {"stage": name, "record": sha256_json(dict(record))})


def _derive(chain: Chain, stage: str, step: int, manifest: str, how: str) -> None:
    """A checkpoint made from the newest state of its stage, or of any."""
    states = [link for link in chain.links if link.kind in _STATES]
    own = [link for link in states if link.body["stage"] == stage]
    parent = None
    if states:
        newest = (own or states)[-1]
        parent = newest.digest if newest.kind != "start" else newest.body["resumed"] or newest.digest
    body = {"stage": stage, "step": step, "manifest": manifest, "how": f"made by {how}", "parent": parent}
    chain.append("derived", {**body, "said": {}})
