"""The tuning stages: a job for the training loop from a recipe's section, and whole weights when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from anychip.chips.backend import detect_backend
from anychip.chips.operators import operators_for
from anychip.chips.profile import choices
from anychip.errors import InputError
from anychip.files import sha256_file, write_json
from anychip.model.lora import is_adapter
from anychip.parallel.parts import initialize_adapters
from anychip.parallel.processes import Processes
from anychip.recipe import Recipe
from anychip.recipe.schema import CheckpointConfig, DpoConfig, GrpoConfig, ModelConfig, SftConfig
from anychip.rundir import CHIP_PROFILE, RunDirectory, stage_before
from anychip.train.checkpoint import CheckpointStore
from anychip.train.checkpoint.manifest import MANIFEST_NAME
from anychip.train.engine import Engine
from anychip.train.job import BatchSource, Evaluate, TrainingJob
from anychip.train.loop import run_training
from anychip.train.precision import compute_dtype
from anychip.train.witness import Witness
from anychip.tune.adapters import adapter_directory, merge_adapter
from anychip.tune.dpo import DpoData, dpo_config, reference_log_probabilities
from anychip.tune.grpo import GrpoData
from anychip.tune.policy import Policy
from anychip.tune.preference import Preference
from anychip.tune.rewards import make_reward
from anychip.tune.rollouts import Rollouts
from anychip.tune.sampler import Sampler
from anychip.tune.sft import SftData, sft_config
from anychip.tune.success import measure_success

TuningConfig = SftConfig | DpoConfig | GrpoConfig


def run_sft(
    recipe: Recipe,
    run: RunDirectory,
    data: SftData,
    evaluate: Evaluate | None,
    identity: str,
    witness: Witness | None = None,
) -> int:
    """Tune the newest pretrained weights; returns the last step."""
    job = sft_job(recipe, run, data, identity)
    return _train(replace(job, evaluate=evaluate, witness=witness), recipe, data.config, run.sft, run.checkpoints)


def sft_job(recipe: Recipe, run: RunDirectory, data: SftData, identity: str) -> TrainingJob:
    """What `run_sft` trains."""
    return _job("sft", recipe, sft_config(recipe), run.sft, run.checkpoints, data, identity)


def run_dpo(recipe: Recipe, run: RunDirectory, identity: str, witness: Witness | None = None) -> int:
    """Tune the newest tuned weights, or else the pretrained ones, on preferences; returns the last step."""
    config, data = dpo_config(recipe), DpoData(recipe, run)
    job = replace(dpo_job(recipe, run, data, identity), witness=witness)
    if config.reference == "precomputed" and run_is_over(job):
        return job.steps
    job = with_reference(job, recipe, run, data, config.reference)
    return _train(job, recipe, config, run.dpo, run.stage_checkpoints(stage_before(recipe, "dpo")))


def dpo_job(recipe: Recipe, run: RunDirectory, data: DpoData, identity: str) -> TrainingJob:
    """What `run_dpo` trains, but for the reference that preferences are compared with."""
    config, start = dpo_config(recipe), run.stage_checkpoints(stage_before(recipe, "dpo"))
    return replace(
        _job("dpo", recipe, config, run.dpo, start, data, identity),
        model=_without_dropout(recipe),
        micro_batch_size=2 * config.micro_batch_size,
        global_batch_size=2 * config.global_batch_size,
        objective=Preference(config.loss, config.beta),
    )


def with_reference(
    job: TrainingJob,
    recipe: Recipe,
    run: RunDirectory,
    data: DpoData,
    how: Literal["precomputed", "on_the_fly"],
) -> TrainingJob:
    """`dpo_job` with what the weights that it starts from say of each pair: all at once, kept in the run, or of each
    batch when it comes. Called by all processes together."""
    config, start = dpo_config(recipe), run.stage_checkpoints(stage_before(recipe, "dpo"))
    frozen, processes = _frozen_engine(job, recipe, start)
    if how == "on_the_fly":
        return replace(job, objective=Preference(config.loss, config.beta, frozen.log_probabilities))
    data.remember_reference(
        reference_log_probabilities(
            data, run, _weights_digest(start), frozen.log_probabilities, processes.any, writes=processes.is_first
        )
    )
    return job


def run_grpo(
    recipe: Recipe,
    run: RunDirectory,
    identity: str,
    make_sampler: Callable[[GrpoData], Sampler],
    witness: Witness | None = None,
) -> int:
    """Tune the newest weights of the stages before by rewards, and ask held-out questions of those and of the result;
    returns the last step."""
    data = GrpoData(recipe, run)
    config, reward = data.config, make_reward(data.config.rewards)
    start = run.stage_checkpoints(stage_before(recipe, "grpo"))
    job = replace(
        _job("grpo", recipe, config, run.grpo, start, data, identity),
        model=_without_dropout(recipe),
        objective=Policy(config.clip_low, config.clip_high, config.beta, config.normalization, config.max_new_tokens),
    )
    sampler = make_sampler(data)
    frozen = None if run_is_over(job) or not config.beta else _frozen_engine(job, recipe, start)[0]
    checkpoints = job.directory / "checkpoints"
    rollouts = Rollouts(data, reward, sampler, run.grpo, recipe.seed, checkpoints, frozen, recipe.log.interval)
    step = _train(replace(job, answering=rollouts, witness=witness), recipe, config, run.grpo, start)
    rank = int(os.environ.get("RANK", "0"))
    if data.held_out and rank < max(1, rollouts.crew):
        stores = CheckpointStore(start), CheckpointStore(run.grpo / "checkpoints")
        record = measure_success(data, reward, sampler, *stores)
        if rank == 0:
            write_json(run.grpo / "success.json", record)
    return step


def run_is_over(job: TrainingJob) -> bool:
    """Whether the job has reached its last step, so that nothing of it is needed any more but a merge."""
    return job.lora is None and job.steps in CheckpointStore(job.directory / "checkpoints").steps()


def _job(
    title: str,
    recipe: Recipe,
    config: TuningConfig,
    directory: Path,
    start: Path,
    source: BatchSource,
    identity: str,
) -> TrainingJob:
    def initialize(parameters: Mapping[str, Tensor]) -> None:
        _load(recipe, start, parameters)
        initialize_adapters(parameters, recipe.seed)

    return TrainingJob(
        title=title,
        directory=directory if config.lora is None else adapter_directory(directory),
        model=recipe.final_model,
        source=source,
        initialize=initialize,
        evaluate=None,
        identity=identity,
        steps=config.steps,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        optimizer=config.optimizer,
        checkpoint=CheckpointConfig(save_interval=recipe.checkpoint.save_interval, keep=1),
        log=recipe.log,
        compute_dtype=recipe.training.compute_dtype,
        recompute=recipe.training.recompute,
        loss_chunk_tokens=recipe.training.loss_chunk_tokens,
        deterministic=recipe.training.deterministic,
        seed=recipe.seed,
        operators=recipe.training.operators,
        profile=directory.parent / CHIP_PROFILE,
        parallel=recipe.parallel,
        guard=recipe.guard,
        lora=config.lora,
    )


def _without_dropout(recipe: Recipe) -> ModelConfig:
    """The model where its log-probabilities are compared with some that nothing was dropped from."""
    return recipe.final_model.model_copy(update={"hidden_dropout": 0.0})


def _train(job: TrainingJob, recipe: Recipe, config: TuningConfig, stage: Path, start: Path) -> int:
    step = run_training(job)
    if config.lora is not None:
        merge_adapter(recipe, config.lora, CheckpointStore(start), stage)
    return step


def _load(recipe: Recipe, start: Path, parameters: Mapping[str, Tensor]) -> None:
    """Fill everything but adapters from the newest checkpoint."""
    store = CheckpointStore(start)
    newest = store.latest()
    if newest is None:
        raise InputError("there is no checkpoint to tune.", where=start, do="Run the stages before this one first.")
    weights = {f"model.{name}": p.detach() for name, p in parameters.items() if not is_adapter(name)}
    store.load(newest, weights, part=recipe.parallel.pipeline_parallel > 1)


def _weights_digest(start: Path) -> str:
    """Which weights tuning starts from: the digest of their manifest, which holds those of all their bytes."""
    newest = CheckpointStore(start).latest()
    return "" if newest is None else sha256_file(newest.path / MANIFEST_NAME)


def _frozen_engine(job: TrainingJob, recipe: Recipe, start: Path) -> tuple[Engine, Processes]:
    """The weights that tuning starts from, laid out as the job's; nothing trains them."""
    backend, processes = detect_backend(), Processes.join_here(job.parallel)
    dtype, operators = (
        compute_dtype(job.compute_dtype, backend),
        operators_for(backend.vendor, choices(job.profile, backend.vendor, job.operators)),
    )
    frozen = Engine(replace(job, lora=None), processes, dtype, operators)
    _load(recipe, start, frozen.parameters)
    for parameter in frozen.parameters.values():
        parameter.requires_grad_(False)
    return frozen, processes
