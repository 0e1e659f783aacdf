"""Training as it was at a state of a chain, ready to take its next steps again: in as many processes as it had, or in
this one alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anychip.attest.witness import manifest_digest
from anychip.chips.backend import detect_backend
from anychip.chips.operators import operators_for
from anychip.chips.profile import choices
from anychip.data.batch import Batch
from anychip.data.loader import TrainingData
from anychip.errors import InputError
from anychip.grow.stage import GrowingRun
from anychip.parallel.parts import initialize_parts
from anychip.parallel.processes import Processes
from anychip.recipe import Recipe
from anychip.recipe.schema import ParallelConfig
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointInfo, CheckpointStore
from anychip.train.engine import Engine
from anychip.train.guard import Guard, GuardState
from anychip.train.heartbeat import Heartbeat
from anychip.train.job import NewParts, TrainingJob, training_job
from anychip.train.optimizer import Optimizer
from anychip.train.precision import compute_dtype
from anychip.train.saves import state_of, weights_of
from anychip.train.step import Growth, StepResult, train_step
from anychip.tune.dpo import DpoData
from anychip.tune.run import dpo_job, sft_job, with_reference
from anychip.tune.sft import SftData

STAGES = ("pretrain", "sft", "dpo")
"""What can be trained again. GRPO cannot: its batches are answers of the model that was trained."""


@dataclass(frozen=True)
class Retraining:
    """A model, its optimizer and all that a step depends on."""

    job: TrainingJob
    engine: Engine
    optimizer: Optimizer
    processes: Processes
    guard: Guard
    new_parts: NewParts | None

    @classmethod
    def of(cls, recipe: Recipe, run: RunDirectory, stage: str, model: int) -> Retraining:
        """The training of a stage, of the recipe's model of this number, in no state yet."""
        backend, job = detect_backend(), _job(recipe, run, stage, model)
        backend.set_deterministic(job.deterministic)
        processes, dtype = Processes.join_here(job.parallel), compute_dtype(job.compute_dtype, backend)
        operators = operators_for(backend.vendor, choices(job.profile, backend.vendor, job.operators))
        engine = Engine(job, processes, dtype, operators)
        lr_scale = job.growing.lr_scale() if job.growing else {}
        optimizer = Optimizer(engine.trainable, job.optimizer, dtype, operators, lr_scale)
        new_parts = job.growing.bind(engine.trainable, optimizer) if job.growing else None
        return cls(job, engine, optimizer, processes, Guard(job.guard), new_parts)

    def restore(self, checkpoint: Path | None, manifest: str) -> None:
        """Bring it into the state of a checkpoint whose manifest has this digest; None: the beginning."""
        everything = len(self.engine.trainable) == len(self.engine.parameters)
        if checkpoint is None or not everything:
            self.job.initialize(self.engine.parameters)
        if checkpoint is None:
            self.optimizer.reset()
            self.guard.restore(GuardState())
            return
        info = opened(checkpoint, manifest)
        self.guard.restore(GuardState.model_validate(info.extra.get("guard", {})))
        state = state_of(self.engine, self.optimizer)
        if info.extra.get("weights_only", False):
            self.optimizer.reset()
            state = self.weights()
        CheckpointStore(checkpoint.parent).load(info, state, part=self.engine.pipelined)

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint has of them: this process's parts, by name."""
        return weights_of(self.engine)

    def step(self, number: int, batch: Batch) -> StepResult:
        """Step `number`, counted from 0."""
        growth = Growth(self.new_parts, number + 1) if self.new_parts else None
        parts = self.engine, self.optimizer, self.processes, batch
        heartbeat = Heartbeat.of_environment(self.processes.rank)
        clip = self.job.optimizer.grad_clip
        self.engine.begin_step(number + 1)
        done = train_step(*parts, self.job.rate(number), clip, self.guard, heartbeat, growth=growth)
        if done.problem and self.new_parts:
            self.new_parts.skip(number + 1)
        return done


def opened(checkpoint: Path, manifest: str) -> CheckpointInfo:
    """A checkpoint, verified whole. Raises InputError when its manifest has another digest."""
    info = CheckpointStore(checkpoint.parent).open(int(checkpoint.name.partition("-")[2]))
    if manifest_digest(info.path) != manifest:
        raise InputError("is another checkpoint than the chain names.", where=checkpoint)
    return info


def parallel(recipe: Recipe) -> ParallelConfig:
    """The recipe's layout where torchrun started several processes; else one process."""
    return recipe.parallel if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ParallelConfig()


def _job(recipe: Recipe, run: RunDirectory, stage: str, model: int) -> TrainingJob:
    here = recipe.model_copy(update={"parallel": parallel(recipe)})
    if stage == "sft":
        return sft_job(here, run, SftData(here, run), "")
    if stage == "dpo":  # the reference is computed here, and not read from what training kept of it
        data = DpoData(here, run)
        return with_reference(dpo_job(here, run, data, ""), here, run, data, "on_the_fly")

    def initialize(parameters: Mapping[str, Tensor]) -> None:
        initialize_parts(parameters, here.model, here.seed)

    whole = training_job(here, run.root, TrainingData(run, here), initialize, None, "")
    return GrowingRun(here, run, whole).job(model) if here.grow else whole
