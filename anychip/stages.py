"""The stages of a run, in order. Each reads the recipe and what earlier stages left, and leaves its result.

A stage that ended is recorded with a fingerprint of everything it depends on: its recipe sections and the stages before
it. With the same fingerprint it is not run again; with another one the run is refused, because its results would no
longer be what the recipe says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anychip.errors import InputError
from anychip.files import sha256_json
from anychip.recipe import Recipe, load_recipe
from anychip.rundir import RunDirectory, stage_before

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.data.batch import Batch
    from anychip.train.job import Evaluate
    from anychip.train.observe import Observer
    from anychip.tune.sft import SftData


@dataclass(frozen=True)
class Stage:
    """`depends_on` names recipe fields; `after` names the stages whose results this one reads. A stage that ended is
    run again when its results are not `there` any more."""

    name: str
    run: Callable[[Recipe, RunDirectory], dict[str, Any]]
    depends_on: Sequence[str]
    after: Sequence[str] = ()
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    there: Callable[[Recipe, RunDirectory], bool] = lambda recipe, run: True


def open_run(recipe_path: Path, overrides: Sequence[str], runs: Path) -> tuple[Recipe, RunDirectory]:
    """Load a recipe and find its run directory; refuse a recipe that contradicts finished stages. Writes nothing."""
    recipe = load_recipe(recipe_path, overrides)
    run = RunDirectory(runs / recipe.name)
    if run.recipe_path.is_file():
        _check_unchanged(recipe, run)
    return recipe, run


def keep_recipe(recipe: Recipe, run: RunDirectory) -> None:
    """Keep the resolved recipe with the run."""
    if _is_first_process() and not (run.recipe_path.is_file() and run.read_recipe() == recipe):
        run.write_recipe(recipe)


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def run_stages(recipe: Recipe, run: RunDirectory) -> None:
    """Run every wanted stage that has not ended."""
    if recipe.attest.key is not None and _is_first_process():  # before hours of training
        _signing_key(recipe.attest.key)
    for stage in STAGES.values():
        if stage.wanted(recipe):
            run_stage(stage.name, recipe, run)
    print(f"report: {run.report}\ntalk to it: anychip chat {run.root}")


def run_stage(name: str, recipe: Recipe, run: RunDirectory) -> None:
    """Run one stage unless it has ended; the stages before it must have ended."""
    _run(STAGES[name], recipe, run)


def _run(stage: Stage, recipe: Recipe, run: RunDirectory) -> None:
    name = stage.name
    if not stage.wanted(recipe):
        raise InputError(f"the recipe has no section for the stage {name}.", where=run.root, do=f"Add tune.{name}.")
    for earlier in stage.after:
        if STAGES[earlier].wanted(recipe) and run.finished(earlier) is None:
            raise InputError(
                f"the stage {name} needs the stage {earlier}, which has not ended.",
                where=run.root,
                do=f"Run `anychip {_verb(earlier)} RECIPE` first, or `anychip run RECIPE` for all stages.",
            )
    if run.finished(name) is not None and name != "report" and stage.there(recipe, run):
        print(f"{name}: done before")
        return
    keep_recipe(recipe, run)
    print(f"{name}: starts", flush=True)
    started = time.monotonic()
    record = stage.run(recipe, run)
    seconds = time.monotonic() - started
    if _is_first_process():
        if recipe.attest.active:
            from anychip.attest.record import record_stage

            record_stage(run, name, record)
        run.finish(name, {"fingerprint": _fingerprint(stage, recipe), "seconds": round(seconds, 3), **record})
    print(f"{name}: done in {seconds:.1f} s", flush=True)


def _verb(stage: str) -> str:
    return "data prepare" if stage == "data" else stage


def _check_unchanged(recipe: Recipe, run: RunDirectory) -> None:
    kept = run.read_recipe()
    for stage in STAGES.values():
        record = run.finished(stage.name)
        if record is None or stage.name == "report" or record.get("fingerprint") == _fingerprint(stage, recipe):
            continue
        changed = _differences(kept.model_dump(mode="json"), recipe.model_dump(mode="json"))
        raise InputError(
            f"the stage {stage.name} of this run was made with another recipe; fields that differ: "
            f"{', '.join(changed) or 'defaults of this release'}.",
            where=run.root,
            do="Give the new recipe another name (--set name=...), or remove the run directory.",
        )


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [path]


def _fingerprint(stage: Stage, recipe: Recipe) -> str:
    fields = {path: _field(recipe.model_dump(mode="json"), path) for path in stage.depends_on}
    earlier = [_fingerprint(STAGES[name], recipe) for name in stage.after if STAGES[name].wanted(recipe)]
    return sha256_json({"stage": stage.name, "fields": fields, "after": earlier})


def _field(recipe: Mapping[str, Any], path: str) -> Any:
    value: Any = recipe
    for key in path.split("."):
        value = value[key]
    return value


def _data(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.data.prepare import prepare_data

    return {"summary": prepare_data(recipe, run)}


def _data_is_there(recipe: Recipe, run: RunDirectory) -> bool:
    from anychip.data.prepare import is_there

    return is_there(recipe, run)


def trace_run(recipe: Recipe, run: RunDirectory, *, interval: int, out: Path | None, max_bytes: int) -> None:
    """Pretrain as the stage does, from its start, and record a trace.

    Raises InputError when the run has been trained already: what was not recorded then cannot be now.
    """
    if run.finished("train") is not None or any(run.checkpoints.glob("step-*")):
        raise InputError(
            "has been trained, at least in part; a trace records a run from its first step.",
            where=run.root,
            do="Give the traced run another name: --set name=NAME.",
        )
    if recipe.training.compile:
        print("training.compile is off while a run is traced", flush=True)
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"compile": False})})
    from anychip.verify.record import Recorder

    path = out or run.trace
    header = {"recipe": recipe.name, "fingerprint": _fingerprint(STAGES["train"], recipe)}
    observer = Recorder(path, interval, header, max_bytes)
    _run(replace(STAGES["train"], run=partial(_train, observer=observer)), recipe, run)
    print(f"trace: {path}")


def _train(recipe: Recipe, run: RunDirectory, observer: Observer | None = None) -> dict[str, Any]:
    from anychip.attest.record import attesting
    from anychip.data.loader import TrainingData
    from anychip.parallel.parts import initialize_parts
    from anychip.plan.saved import predicted_rate
    from anychip.train.job import training_job
    from anychip.train.loop import run_training

    def initialize(parameters: Mapping[str, Tensor]) -> None:
        initialize_parts(parameters, recipe.model, recipe.seed)

    evaluate = _validation(recipe, run) if recipe.data.validation_fraction else None
    identity = _fingerprint(STAGES["train"], recipe)
    predicted = predicted_rate(recipe, run.plan, int(os.environ.get("WORLD_SIZE", "1")))
    job = training_job(recipe, run.root, TrainingData(run, recipe), initialize, evaluate, identity, predicted)
    with attesting(recipe, run, "pretrain") as witness:
        job = replace(job, witness=witness, observer=observer or job.observer)
        if recipe.grow:
            from anychip.grow.stage import GrowingRun

            return {"step": GrowingRun(recipe, run, job).train()}
        return {"step": run_training(job)}


def grow_by_hand(
    recipe_path: Path,
    overrides: Sequence[str],
    runs: Path,
    number: int,
    source: Path | None,
    target: Path | None,
    processes: int,
    *,
    prove_it: bool,
) -> str:
    """Grow one checkpoint by the recipe's growth of this number; returns what was found, in words."""
    from anychip.grow.hand import grow_one

    recipe, run = open_run(recipe_path, overrides, runs)
    if not 0 <= number < len(recipe.grow):
        raise InputError(
            f"has {len(recipe.grow)} growths, and --growth is {number}.", where=recipe_path, do="They count from 0."
        )
    if (source is None) != (target is None):
        raise InputError("--source and --target go together.", do="Give both folders, or neither for the run's own.")
    identity = _fingerprint(STAGES["train"], recipe) if source is None else None
    return grow_one(recipe, run, number, source, target, processes, identity, prove_it=prove_it)


def dry_run_growth(recipe_path: Path, overrides: Sequence[str], runs: Path, processes: int, *, as_json: bool) -> str:
    """Time, disk and memory of all growths of a recipe."""
    from anychip.grow.estimate import dry_run

    return dry_run(load_recipe(recipe_path, overrides), runs, processes, as_json=as_json)


def _validation(recipe: Recipe, run: RunDirectory) -> Evaluate:
    from anychip.data.validation import validation_batches
    from anychip.evals.bits_per_byte import measure_bits_per_byte

    def evaluate(score: Callable[[Batch], float]) -> Mapping[str, float]:
        batches = validation_batches(run, recipe, recipe.training.micro_batch_size, recipe.training.eval_tokens)
        measured = measure_bits_per_byte(score, batches)
        return {"validation_bits_per_byte": measured.bits_per_byte, "validation_loss": measured.nats_per_token}

    return evaluate


def _sft(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.attest.record import attesting
    from anychip.tune.run import run_sft
    from anychip.tune.sft import SftData

    data = SftData(recipe, run)
    evaluate = _held_out_loss(data) if data.split.held_out_phrasings else None
    with attesting(recipe, run, "sft", after="pretrain") as witness:
        return {"step": run_sft(recipe, run, data, evaluate, _fingerprint(STAGES["sft"], recipe), witness)}


def _dpo(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.attest.record import attesting
    from anychip.tune.run import run_dpo

    with attesting(recipe, run, "dpo", after=stage_before(recipe, "dpo")) as witness:
        return {"step": run_dpo(recipe, run, _fingerprint(STAGES["dpo"], recipe), witness)}


def _grpo(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.attest.record import attesting
    from anychip.chips.backend import detect_backend
    from anychip.serve.sampler import EngineSampler
    from anychip.train.precision import compute_dtype
    from anychip.tune.grpo import GrpoData
    from anychip.tune.run import run_grpo
    from anychip.tune.sampler import Sampler

    before = stage_before(recipe, "grpo")
    dtype = compute_dtype(recipe.training.compute_dtype, detect_backend())

    def make_sampler(data: GrpoData) -> Sampler:
        end, at_once = data.tokenizer.eos_id, data.config.answers_at_once
        if data.config.sampler == "anychip":
            return EngineSampler(recipe.final_model, dtype, end, at_once)
        from anychip.interchange.export import export_run
        from anychip.serve.vllm_sampler import VllmSampler, layout_for_vllm

        export = run.grpo / f"start-{os.environ.get('RANK', '0')}"
        export_run(run, stage=before, out=export, layout=layout_for_vllm(recipe.final_model))
        return VllmSampler(recipe.final_model, dtype, end, at_once, export)

    with attesting(recipe, run, "grpo", after=before) as witness:
        return {"step": run_grpo(recipe, run, _fingerprint(STAGES["grpo"], recipe), make_sampler, witness)}


def _held_out_loss(data: SftData) -> Evaluate:
    """Loss on questions about known subjects in words that tuning never uses."""
    from anychip.evals.bits_per_byte import measure_bits_per_byte

    def evaluate(score: Callable[[Batch], float]) -> Mapping[str, float]:
        batches = data.held_out_batches(data.split.held_out_phrasings[:_HELD_OUT_DIALOGS])
        return {"validation_loss": measure_bits_per_byte(score, batches).nats_per_token}

    return evaluate


def _samples(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.evals.samples import sample_answers
    from anychip.interchange.load import load_for_inference
    from anychip.tune.questions import choose_questions
    from anychip.tune.sft import SftData

    assert recipe.tune.sft is not None
    sft = recipe.tune.sft
    questions = choose_questions(sft.questions, SftData(recipe, run).split)
    answers = sample_answers(
        load_for_inference(run.root), questions, run, system_prompt=sft.system_prompt, template=recipe.tune.template
    )
    for sample in answers[:_SAMPLES_SHOWN]:
        print(f"  Q: {sample.question}\n  A: {sample.answer}")
    return {"answers": len(answers)}


def _eval(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.evals.run import evaluate_run

    return {"evaluation": evaluate_run(run, recipe)}


def _tasks(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.serve.evaluate import described, evaluate_tasks, keep_results, open_model

    model = open_model(str(run.root), chat=recipe.eval.chat)
    records = evaluate_tasks(model, [Path(task) for task in recipe.eval.tasks], harness=recipe.eval.harness)
    keep_results(run.tasks, records)
    for record in records:
        print(f"  {described(record)}")
    return {"tasks": len(records)}


def _export(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.interchange.export import export_run

    return {"path": str(export_run(run))}


def _report(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.report import write_report

    return {"path": str(write_report(run))}


def _release(recipe: Recipe, run: RunDirectory) -> dict[str, Any]:
    from anychip.attest.keys import public_path
    from anychip.attest.release import make_release

    assert recipe.attest.key is not None
    key = _signing_key(recipe.attest.key)
    path = make_release(run, None, key)
    print(f"  check it: anychip attest check {path} --operator {public_path(key)}")
    return {"path": str(path)}


def _signing_key(path: str) -> Path:
    try:
        from anychip.attest.keys import existing_key
    except ImportError as error:
        do = 'Run: pip install "anychip[attest]", or leave attest.key out.'
        raise InputError(f"keys need a package that is missing ({error}).", where="attest.key", do=do) from None
    return existing_key(Path(path).expanduser())


_HELD_OUT_DIALOGS = 300
_SAMPLES_SHOWN = 3
_TRAINED_WITH = (
    "seed",
    "model",
    "optimizer",
    "training.seq_length",
    "training.global_batch_size",
    "training.steps",
    "training.compute_dtype",
    "training.document_mask",
    "training.loss_chunk_tokens",
    "data.mixture",
    "grow",
)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", _data, ["seed", "data.sources", "data.validation_fraction", "data.cleaning", "data.dedup",
                              "data.tokenizer", "model.vocab_size"], there=_data_is_there),
        Stage("train", _train, _TRAINED_WITH, after=["data"]),
        Stage("sft", _sft, ["tune.sft", "tune.template"], after=["train"],
              wanted=lambda recipe: recipe.tune.sft is not None),
        Stage("dpo", _dpo, ["tune.dpo", "tune.template"], after=["train", "sft"],
              wanted=lambda recipe: recipe.tune.dpo is not None),
        Stage("grpo", _grpo, ["tune.grpo", "tune.template"], after=["train", "sft", "dpo"],
              wanted=lambda recipe: recipe.tune.grpo is not None),
        Stage("eval", _eval, ["eval.baselines", "eval.max_tokens"], after=["train"]),
        Stage("tasks", _tasks, ["eval"], after=["train", "sft", "dpo", "grpo"],
              wanted=lambda recipe: bool(recipe.eval.tasks)),
        Stage("export", _export, ["export"], after=["train", "sft", "dpo", "grpo", "eval", "tasks"]),
        Stage("samples", _samples, [], after=["sft", "dpo", "grpo"], wanted=lambda recipe: recipe.tune.sft is not None),
        Stage("report", _report, [], after=["train"]),
        Stage("release", _release, ["attest.key"], after=["eval", "export"],
              wanted=lambda recipe: recipe.attest.key is not None, there=lambda recipe, run: run.release.is_dir()),
    )
}  # fmt: skip
