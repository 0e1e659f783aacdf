"""What the training loop is given: pretraining and supervised tuning differ only in this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from anychip.data.batch import Batch
from anychip.recipe.schema import (
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
)
from anychip.rundir import CHIP_PROFILE
from anychip.train.objective import NextToken, Objective
from anychip.train.observe import Observer
from anychip.train.optimizer import Optimizer
from anychip.train.schedule import lr_share
from anychip.train.witness import Witness

if TYPE_CHECKING:
    from anychip.train.engine import Engine

Initialize = Callable[[Mapping[str, Tensor]], None]
Evaluate = Callable[[Callable[[Batch], float]], Mapping[str, float]]


class BatchSource(Protocol):
    """Batches by step: a pure function of the recipe, so that nothing of the reader needs saving."""

    def batch(self, step: int) -> Batch:
        """The whole global batch of `step`, counted from 0."""

    def documents(self, step: int) -> list[str]:
        """The documents that the batch of `step` is made of, by id."""


class Answering(Protocol):
    """Makes the batch of a step from questions and the weights at hand. Called by all processes together."""

    def answer(self, engine: Engine, batch: Batch, step: int) -> tuple[Batch, Mapping[str, float]]:
        """The batch of `step` (from 0) with answers to what it asks, and what was measured about them, for the log."""


class NewParts(Protocol):
    """Parts of a grown model that are still new; `step` counts from 1: the step that is being made."""

    def scale_gradients(self, step: int) -> None:
        """Called when the gradients are there, before they are measured."""

    def update(self, step: int, lr: float) -> AbstractContextManager[None]:
        """Entered around the optimizer's step."""

    def skip(self, step: int) -> None:
        """Called for a step that counts and changed nothing."""


class Growing(Protocol):
    """Training that goes on from a grown checkpoint of step `grown_at`."""

    @property
    def grown_at(self) -> int: ...

    def lr_share(self, step: int) -> float:
        """Share of the scheduled rate at `step`, counted from 0."""

    def lr_scale(self) -> Mapping[str, float]:
        """Factors of AdamW's rate by parameter."""

    def bind(self, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> NewParts:
        """The new parts of what is here."""


@dataclass(frozen=True)
class TrainingJob:
    """One training run over `steps` global batches.

    `initialize` fills a new model's parameters, given by logical name, when there is no checkpoint; `evaluate` is given
    a function that scores a batch (its summed loss in nats) and returns named numbers for the log (every
    `eval_interval` steps, 0 for the end only). `identity` is kept in each checkpoint; a checkpoint of another identity
    is refused.
    """

    title: str
    directory: Path
    model: ModelConfig
    source: BatchSource
    initialize: Initialize
    evaluate: Evaluate | None
    identity: str
    steps: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    recompute: Literal["none", "selective", "full"] = "selective"
    compile: bool = False
    loss_chunk_tokens: int = 512
    eval_interval: int = 0
    deterministic: bool = False
    seed: int = 0  # of dropout
    guard: GuardConfig = field(default_factory=GuardConfig)
    operators: Mapping[str, str] = field(default_factory=dict)
    profile: Path | None = None  # of the chip, by `anychip probe`; what `operators` says goes first
    objective: Objective = field(default_factory=NextToken)
    observer: Observer = field(default_factory=Observer)
    answering: Answering | None = None  # what batches hold is written by the model that is trained
    lora: LoraConfig | None = None  # the weights stay, and adapters beside them are learned
    predicted: float | None = None  # tokens a second and device, by `anychip plan --save`
    witness: Witness | None = None  # writes down where the weights come from
    until: int | None = None  # the step at which this model ends, because it grows there
    checkpoints: Path | None = None  # default: below `directory`
    growing: Growing | None = None
    lineage: Sequence[Mapping[str, Any]] = ()  # the growths behind this model, kept in its checkpoints

    @property
    def checkpoint_root(self) -> Path:
        return self.checkpoints or self.directory / "checkpoints"

    @property
    def end(self) -> int:
        """The step to train to; rates follow from `steps`."""
        return self.steps if self.until is None else self.until

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        rate = self.optimizer.lr * lr_share(self.optimizer.schedule, step, self.steps)
        return rate if self.growing is None else rate * self.growing.lr_share(step)


def training_job(
    recipe: Recipe,
    directory: Path,
    source: BatchSource,
    initialize: Initialize,
    evaluate: Evaluate | None,
    identity: str,
    predicted: float | None = None,
) -> TrainingJob:
    """The pretraining that a recipe describes."""
    training = recipe.training
    return TrainingJob(
        title="train",
        directory=directory,
        model=recipe.model,
        source=source,
        initialize=initialize,
        evaluate=evaluate,
        identity=identity,
        steps=training.steps,
        seq_length=training.seq_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        optimizer=recipe.optimizer,
        checkpoint=recipe.checkpoint,
        log=recipe.log,
        compute_dtype=training.compute_dtype,
        recompute=training.recompute,
        compile=training.compile,
        loss_chunk_tokens=training.loss_chunk_tokens,
        eval_interval=training.eval_interval,
        deterministic=training.deterministic,
        seed=recipe.seed,
        operators=training.operators,
        profile=directory / CHIP_PROFILE,
        parallel=recipe.parallel,
        guard=recipe.guard,
        predicted=predicted,
    )
