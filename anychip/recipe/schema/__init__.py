"""The recipe: every number of a run, from corpus to chat, in one schema.

Model fields carry Hugging Face `config.json` names, training fields Megatron's. Lengths are in tokens, times in
seconds, sizes in bytes, unless a name says otherwise.
"""

from anychip.recipe.schema.data import (
    CleaningConfig,
    DataConfig,
    DedupConfig,
    ExecutorConfig,
    MixtureChange,
    SourceConfig,
    TokenizerConfig,
)
from anychip.recipe.schema.model import Family, ModelConfig, RopeScaling, YarnScaling
from anychip.recipe.schema.results import AttestConfig, EvalConfig, ExportConfig, SamplingConfig, ServeConfig
from anychip.recipe.schema.section import Count, Fraction, Positive, Section
from anychip.recipe.schema.training import (
    TWO_STAGE_SCHEDULES,
    CheckpointConfig,
    GrowthConfig,
    GuardConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
)
from anychip.recipe.schema.tuning import (
    ChatTemplate,
    DialogForm,
    DialogSource,
    DpoConfig,
    GrpoConfig,
    LoraConfig,
    LoraTarget,
    LossOn,
    RewardConfig,
    SftConfig,
    TuneConfig,
)
from anychip.recipe.schema.whole import Recipe

SCHEMA_VERSION = 1

__all__ = [
    "SCHEMA_VERSION",
    "TWO_STAGE_SCHEDULES",
    "AttestConfig",
    "ChatTemplate",
    "CheckpointConfig",
    "CleaningConfig",
    "Count",
    "DataConfig",
    "DedupConfig",
    "DialogForm",
    "DialogSource",
    "DpoConfig",
    "EvalConfig",
    "ExecutorConfig",
    "ExportConfig",
    "Family",
    "Fraction",
    "GrowthConfig",
    "GrpoConfig",
    "GuardConfig",
    "LogConfig",
    "LoraConfig",
    "LoraTarget",
    "LossOn",
    "MixtureChange",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Positive",
    "Recipe",
    "RewardConfig",
    "RopeScaling",
    "SamplingConfig",
    "ScheduleConfig",
    "Section",
    "ServeConfig",
    "SftConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TuneConfig",
    "YarnScaling",
]
