"""One growth outside a run's own training: of the run's checkpoint, or of any folder of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anychip.errors import InputError
from anychip.files import sha256_json
from anychip.grow.stage import held_out_text, keep_record, make_plan
from anychip.grow.stream import Stream, grow_checkpoint
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore


def grow_one(
    recipe: Recipe,
    run: RunDirectory,
    number: int,
    source: Path | None,
    target: Path | None,
    processes: int,
    identity: str | None,
    *,
    prove_it: bool,
) -> str:
    """Grow the newest checkpoint of `source` into `target`, or the run's own one at the step of this growth; returns
    what was found. `identity` is the training's, which the run's checkpoints carry."""
    store = CheckpointStore(source or run.model_checkpoints(recipe, number))
    step = store.newest_step() if source is not None else recipe.growth_steps[number]
    info = store.open(step)
    texts = held_out_text(recipe, run) if (run.data / "summary.json").is_file() else {}
    plan = make_plan(recipe, number, info, texts)
    for name, entry in info.tensors.items():
        if name == "model.embed_tokens.weight" and entry.shape != [plan.old.vocab_size, plan.old.hidden_size]:
            raise InputError(
                f"is of a model with an embedding of {entry.shape}, not of the recipe's model {number}.",
                where=info.path,
                do="Give the checkpoint that --growth starts from.",
            )
    extra: dict[str, Any] = {
        name: info.extra[name] for name in ("skipped", "guard", "weights_only") if name in info.extra
    }
    if identity is not None:
        extra["identity"] = sha256_json([identity, number + 1])
    stream = Stream(info, plan, target or run.model_checkpoints(recipe, number + 1), extra)
    proof = grow_checkpoint(stream, texts, processes, prove_it=prove_it)
    if proof is None:
        return f"{stream.final}: grown, not proved"
    if source is None:
        keep_record(run.growth(number), stream, proof, recipe, 0.0)
    return f"{stream.final}: {'; '.join(plan.operators())}; {proof.sentence()}"
