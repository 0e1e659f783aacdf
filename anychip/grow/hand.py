"""One growth outside a run's own training: of the run's checkpoint, or of any folder of checkpoints."""

from __future__ import annotations

from pathlib import Path

from anychip.errors import InputError
from anychip.files import sha256_json
from anychip.grow.stage import held_out_text, keep_record, make_plan
from anychip.grow.stream import Stream, kept_extra
from anychip.grow.together import grow_together, open_store, ranks
from anychip.model.arithmetic import parameter_shapes
from anychip.recipe import ModelConfig, Recipe
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointInfo


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
    what was found, on the first of torchrun's processes. `identity` is the training's, which the run's checkpoints
    carry."""
    together = ranks()
    if together is not None and processes > 1:
        raise InputError("--processes starts processes, and torchrun did so already.", do="Leave --processes out.")
    store = open_store(source or run.model_checkpoints(recipe, number), together)
    step = store.newest_step() if source is not None else recipe.growth_steps[number]
    if source is not None and not step:
        raise InputError("there is no checkpoint here.", where=source, do="Give the folder that holds step-N.")
    info = store.open(step)
    texts = held_out_text(recipe, run) if (run.data / "summary.json").is_file() else {}
    plan = make_plan(recipe, number, info, texts)
    _check_source(info, plan.old, number)
    extra = kept_extra(info)
    if identity is not None:
        extra["identity"] = sha256_json([identity, number + 1])
    stream = Stream(info, plan, target or run.model_checkpoints(recipe, number + 1), extra)
    proof = grow_together(stream, texts, together, processes, prove_it=prove_it)
    if together is not None and not together.is_first:
        return ""
    if proof is None:
        return f"{stream.final}: grown, not proved"
    if source is None:
        keep_record(run.growth(number), stream, proof, recipe, 0.0)
    return f"{stream.final}: {'; '.join(plan.operators())}; {proof.sentence()}"


def _check_source(info: CheckpointInfo, model: ModelConfig, number: int) -> None:
    """Raise InputError unless the checkpoint is of this model."""
    for name, shape in parameter_shapes(model):
        entry = info.tensors.get(f"model.{name}")
        if entry is None or tuple(entry.shape) != shape:
            has = "no tensor" if entry is None else f"a tensor of {entry.shape}"
            raise InputError(
                f"has {has} {name}, where the recipe's model {number} has one of {list(shape)}.",
                where=info.path,
                do="Give the checkpoint that --growth starts from.",
            )
