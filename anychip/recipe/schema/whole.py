"""The whole recipe, and what its sections say of each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from anychip.recipe.schema.data import DataConfig
from anychip.recipe.schema.model import ModelConfig
from anychip.recipe.schema.results import AttestConfig, EvalConfig, ExportConfig, ServeConfig
from anychip.recipe.schema.section import Section
from anychip.recipe.schema.training import (
    CheckpointConfig,
    GrowthConfig,
    GuardConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from anychip.recipe.schema.tuning import TuneConfig


class Recipe(Section):
    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", description="the run directory is runs/NAME")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    tune: TuneConfig = TuneConfig()
    eval: EvalConfig = EvalConfig()
    export: ExportConfig = ExportConfig()
    serve: ServeConfig = ServeConfig()
    attest: AttestConfig = AttestConfig()
    grow: list[GrowthConfig] = Field(default_factory=list, description="growth during training, in order of tokens")

    @property
    def models(self) -> list[ModelConfig]:
        """The model that training starts with, and what it is after each growth."""
        found = [self.model]
        for growth in self.grow:
            found.append(ModelConfig.model_validate(found[-1].model_dump() | growth.to))
        return found

    @property
    def final_model(self) -> ModelConfig:
        """What training ends with: the model that is tuned, evaluated and published."""
        return self.models[-1]

    @property
    def growth_steps(self) -> list[int]:
        """The step after which each growth happens."""
        tokens = self.training.global_batch_size * self.training.seq_length
        return [-(-growth.at_tokens // tokens) for growth in self.grow]

    @model_validator(mode="after")
    def _growth_is_possible(self) -> Recipe:
        steps = self.growth_steps
        if steps != sorted(set(steps)):
            raise ValueError(f"grow: at_tokens must rise by a step at least, found growth after steps {steps}")
        if steps and steps[-1] >= self.training.steps:
            raise ValueError(f"grow: growth after step {steps[-1]} is not within training.steps {self.training.steps}")
        known = set(ModelConfig.model_fields)
        for number, growth in enumerate(self.grow):
            if unknown := sorted(set(growth.to) - known):
                raise ValueError(f"grow.{number}.to.{unknown[0]} is not a field of the model")
        try:
            models = self.models
        except ValidationError as error:
            raise ValueError(f"grow: {error.errors()[0]['msg']}") from None
        for before, after in pairwise(models):
            if before.head_dim != after.head_dim:
                raise ValueError(
                    f"grow: heads would be {after.head_dim} wide instead of {before.head_dim}; let num_attention_heads "
                    "grow as hidden_size does, or set model.kv_channels"
                )
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Recipe:
        if self.training.seq_length > self.model.max_position_embeddings:
            raise ValueError(
                f"training.seq_length {self.training.seq_length} is above model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        wanted = self.data.tokenizer.vocab_size
        if wanted is not None and wanted > self.model.vocab_size:
            raise ValueError(f"data.tokenizer.vocab_size {wanted} is above model.vocab_size {self.model.vocab_size}")
        return self
