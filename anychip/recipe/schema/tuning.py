"""Tuning: dialogs, preferences, rewards, adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from anychip.recipe.schema.section import Positive, Section
from anychip.recipe.schema.training import OptimizerConfig, ScheduleConfig

ChatTemplate = Literal["A", "B", "C", "D", "E"]
DialogForm = Literal["auto", "openai", "telechat", "telechat-tools", "telechat-inline", "alpaca", "sharegpt"]
LossOn = Literal["answer", "telechat-torch", "all"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class DialogSource(Section):
    """A file of dialogs, and how often they are read."""

    path: str = Field(
        description="a .jsonl (or a .json list) of dialogs; or `python:docstrings`, pairs made from installed "
        "documentation strings; or `puzzle:letters`, short questions about the last of four letters"
    )
    weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="times each dialog is read in an epoch; 0.5 reads it in every second one"
    )
    format: DialogForm = Field("auto", description="auto: by the fields of each record")


class LoraConfig(Section):
    """Low-rank adapters beside matrices that stay as they are (arXiv 2106.09685)."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="the adapter's product is scaled by alpha / rank")
    target_modules: Annotated[list[LoraTarget], Field(min_length=1)] = Field(
        default_factory=lambda: list(get_args(LoraTarget)), description="the matrices of each layer that get one"
    )


def _one_source(raw: Any) -> Any:
    """`dataset: PATH`, as recipes said it before there were several sources."""
    if isinstance(raw, dict) and "dataset" in raw:
        if "sources" in raw:
            raise ValueError("give `sources` or the older `dataset`, not both")
        return {"sources": [{"path": raw["dataset"]}], **{k: v for k, v in raw.items() if k != "dataset"}}
    return raw


def _adapters_take_adamw(lora: LoraConfig | None, optimizer: OptimizerConfig) -> None:
    if lora is not None and optimizer.name != "adamw":
        raise ValueError(f"lora goes with the optimizer adamw, not {optimizer.name}")


class SftConfig(Section):
    """Supervised tuning on dialogs, from the last pretraining checkpoint."""

    sources: Annotated[list[DialogSource], Field(min_length=1)] = Field([DialogSource(path="python:docstrings")])
    subjects: list[str] = Field(
        default_factory=list,
        description="keep only dialogs about these modules, classes or functions, such as str or os.path; empty: all",
    )
    loss_on: LossOn = Field(
        "answer",
        description="answer: what the model is to say and the `<_end>` behind it; telechat-torch: as TeleChat's "
        "published code, also `<_bot>` and each `<_user>`; all: every token",
    )
    parity: bool = Field(
        False, description="render as the published templates do it to the letter, to match weights tuned so"
    )
    packing: bool = Field(
        False, description="fill each sample with several dialogs; attention stays inside each, none is cut"
    )
    too_long: Literal["report", "refuse"] = Field(
        "report", description="dialogs longer than seq_length: leave out and say how many, or stop"
    )
    steps: Positive = 100
    seq_length: Positive = 256
    micro_batch_size: Positive = 8
    global_batch_size: Positive = 8
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, schedule=ScheduleConfig(warmup_steps=10))
    lora: LoraConfig | None = None
    system_prompt: str = ""
    questions: list[str] = Field(default_factory=list, description="questions asked of the tuned model in the report")

    _dataset = model_validator(mode="before")(_one_source)

    @model_validator(mode="after")
    def _fits(self) -> SftConfig:
        _adapters_take_adamw(self.lora, self.optimizer)
        return self


class DpoConfig(Section):
    """Direct preference optimization (arXiv 2305.18290), from the last SFT checkpoint, or else the pretrained one."""

    sources: Annotated[list[DialogSource], Field(min_length=1)]
    loss: Literal["dpo", "ipo"] = Field("dpo", description="ipo: arXiv 2310.12036")
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="how closely the model is kept to its reference")
    reference: Literal["precomputed", "on_the_fly"] = Field(
        "precomputed",
        description="log-probabilities of the starting weights: of all pairs once, or with each step by a frozen copy",
    )
    too_long: Literal["report", "refuse"] = Field(
        "report", description="pairs longer than seq_length: leave out and say how many, or stop"
    )
    steps: Positive = 100
    seq_length: Positive = 256
    micro_batch_size: Positive = Field(4, description="pairs in work at a time, per process")
    global_batch_size: Positive = Field(4, description="pairs a step; a multiple of processes x `micro_batch_size`")
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6, weight_decay=0.0, schedule=ScheduleConfig(warmup_steps=10))
    lora: LoraConfig | None = None
    system_prompt: str = ""

    @model_validator(mode="after")
    def _fits(self) -> DpoConfig:
        _adapters_take_adamw(self.lora, self.optimizer)
        return self


class RewardConfig(Section):
    """A score of an answer, times a weight; an answer's reward is the sum over all rewards of the section."""

    kind: Literal["exact", "pattern", "maths", "code", "custom"] = Field(
        description="exact: is it the known answer; pattern: does a regular expression match; maths: is it "
        "mathematically equal (math-verify); code: does it pass the tests; custom: a Python function"
    )
    weight: float = 1.0
    pattern: str = Field("", description="pattern: the expression, which the whole answer must match")
    function: str = Field("", description="custom: `module:function`, called with an answer, returns a number")
    seconds: Annotated[float, Field(gt=0)] = Field(5.0, description="code: CPU time allowed")
    memory_bytes: Positive = Field(512 << 20, description="code: memory allowed")

    @model_validator(mode="after")
    def _complete(self) -> RewardConfig:
        if bool(self.pattern) != (self.kind == "pattern"):
            raise ValueError("kind pattern needs `pattern`, and no other kind takes it")
        if bool(self.function) != (self.kind == "custom"):
            raise ValueError("kind custom needs `function`, and no other kind takes it")
        return self


class GrpoConfig(Section):
    """Group relative policy optimization (arXiv 2402.03300) with rewards that can be checked, from the last tuned
    checkpoint, or else the pretrained one."""

    sources: Annotated[list[DialogSource], Field(min_length=1)]
    rewards: Annotated[list[RewardConfig], Field(min_length=1)] = Field([RewardConfig(kind="exact")])
    group_size: Annotated[int, Field(ge=2)] = Field(8, description="answers to each question")
    iterations: Positive = Field(1, description="updates of the model by the same answers")
    beta: Annotated[float, Field(ge=0)] = Field(
        0.04, description="weight of the divergence from the starting weights; 0: they are not kept in memory"
    )
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="probabilities may fall by this share")
    clip_high: Annotated[float, Field(gt=0)] = Field(
        0.2, description="probabilities may rise by this share; 0.28 in DAPO (arXiv 2503.14476)"
    )
    normalization: Literal["sequence", "token", "length"] = Field(
        "sequence",
        description="sequence: each answer counts alike (arXiv 2402.03300); token: each token (DAPO, arXiv 2503.14476);"
        " length: sums over a constant, the longest answer (Dr. GRPO, arXiv 2503.20783)",
    )
    scale_rewards: bool = Field(
        True, description="divide advantages by their group's standard deviation; Dr. GRPO does not"
    )
    sampler: Literal["anychip", "vllm"] = Field("anychip", description="what writes the answers")
    answers_at_once: Positive = Field(64, description="answers in work at a time, per process")
    max_new_tokens: Positive = Field(64, description="longest answer, its end included")
    largest_difference: Annotated[float, Field(gt=0)] = Field(
        0.02,
        description="mean absolute difference between log-probabilities of sampler and training, in nats a token, "
        "above which the run stops",
    )
    held_out_questions: Annotated[int, Field(ge=0)] = Field(
        200, description="held-out questions asked of the model before and after; 0: none"
    )
    too_long: Literal["report", "refuse"] = Field(
        "report", description="questions longer than seq_length - max_new_tokens: leave out, or stop"
    )
    steps: Positive = 100
    seq_length: Positive = Field(256, description="question and answer")
    micro_batch_size: Positive = Field(8, description="answers in training at a time, per process")
    global_batch_size: Positive = Field(
        64, description="answers a step; a multiple of `group_size` and of processes x `micro_batch_size`"
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6, weight_decay=0.0, schedule=ScheduleConfig(warmup_steps=10))
    lora: LoraConfig | None = None
    system_prompt: str = ""

    @model_validator(mode="after")
    def _fits(self) -> GrpoConfig:
        _adapters_take_adamw(self.lora, self.optimizer)
        if self.global_batch_size % self.group_size:
            raise ValueError(f"global_batch_size {self.global_batch_size} is not a multiple of {self.group_size}")
        if self.max_new_tokens >= self.seq_length:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} leaves no room in seq_length {self.seq_length}")
        return self


class TuneConfig(Section):
    template: ChatTemplate = Field(
        "B",
        description="chat template: A the TeleChat2-115B of 2024, B TeleChat2, C T1, D TeleChat3, E TeleChat3-Coder",
    )
    sft: SftConfig | None = None
    dpo: DpoConfig | None = None
    grpo: GrpoConfig | None = None
