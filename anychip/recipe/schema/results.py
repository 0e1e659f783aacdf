"""What becomes of a model: evaluation, export, serving, attestation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from anychip.recipe.schema.section import Positive, Section


class EvalConfig(Section):
    baselines: bool = Field(True, description="also measure xz -9 and a 5-gram model on the same held-out text")
    max_tokens: Positive = Field(262_144, description="held-out tokens scored")
    tasks: list[str] = Field(
        default_factory=list, description="task files in lm-eval's form, run over the newest tuned model"
    )
    harness: bool = Field(False, description="run the task files by lm-eval instead of our own runner")
    chat: bool = Field(True, description="ask the tasks in the chat template")


class ExportConfig(Section):
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    layout: Literal["family", "llama"] = Field(
        "family",
        description="llama: names that any program knows (Llama, Mixtral), without remote code, where they can say it",
    )
    max_shard_bytes: Positive = 5_000_000_000
    license: str = "apache-2.0"


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=0)] = Field(0.7, description="0 takes the likeliest token")
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="0: no limit")
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Positive = 256

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1


class ServeConfig(Section):
    sampling: SamplingConfig = SamplingConfig()


class AttestConfig(Section):
    """What a run writes down so that others can check where its weights come from, and which chips may take part."""

    record: bool = Field(False, description="keep the chain in attest/; so does everything below")
    key: str | None = Field(
        None, description="`anychip run` ends with a release signed with this key (PEM), which is made if it is missing"
    )
    allow_vendors: list[str] = Field(
        default_factory=list, description="the only vendors or makers whose chips may train; empty: all"
    )
    deny_vendors: list[str] = Field(default_factory=list, description="vendors or makers whose chips may not train")
    deny_country: list[Annotated[str, Field(pattern=r"^[A-Za-z]{2}$")]] = Field(
        default_factory=list, description="countries (two letters) whose makers' chips may not train"
    )

    @property
    def active(self) -> bool:
        return self.record or bool(self.key or self.allow_vendors or self.deny_vendors or self.deny_country)
