"""The corpus: where it comes from, how it is cleaned, cut into tokens and mixed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from anychip.recipe.schema.section import Fraction, Positive, Section


class SourceConfig(Section):
    """One corpus. Its share of the training tokens is its weight over the sum of weights."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    path: str = Field(
        description="a file or folder (text, Markdown, source code, .jsonl[.gz|.zst], .parquet), `python:stdlib` for "
        "the sources and documentation of the Python standard library, `python:PACKAGE` for an installed package, "
        "or a Megatron prefix (PATH without .bin/.idx)"
    )
    weight: Annotated[float, Field(gt=0)] = 1.0
    format: Literal["auto", "text", "jsonl", "parquet", "megatron"] = "auto"
    text_field: str = Field("text", description="the field of a JSON line or Parquet row that holds the text")
    include: list[str] = Field(default_factory=list, description="file-name patterns to keep, such as *.py")


class CleaningConfig(Section):
    enabled: bool = True
    min_characters: Annotated[int, Field(ge=0)] = 64
    max_characters: Positive = 2_000_000
    max_line_characters: Positive = Field(
        2_000, description="mean length of lines and sentences above which a document is data"
    )
    min_alphanumeric_fraction: Fraction = 0.25
    max_repeated_line_fraction: Fraction = 0.5
    normalize: bool = Field(True, description="repair mojibake and line ends (ftfy), drop control characters")


class DedupConfig(Section):
    enabled: bool = True
    ngram: Positive = Field(5, description="words a shingle")
    buckets: Positive = Field(14, description="MinHash LSH buckets; with 8 hashes each, near 0.7 similarity")
    hashes_per_bucket: Positive = 8


class TokenizerConfig(Section):
    kind: Literal["bpe", "json", "sentencepiece"] = "bpe"
    path: str | None = Field(
        None, description="tokenizer.json or tokenizer.model to load; for bpe: none, it is trained"
    )
    vocab_size: Positive | None = Field(
        None, description="pieces to train, special tokens included; default: the model's"
    )
    training_bytes: Positive = Field(50_000_000, description="text the BPE learns from, sampled over all documents")

    @model_validator(mode="after")
    def _path_matches_kind(self) -> TokenizerConfig:
        if (self.kind == "bpe") == (self.path is not None):
            raise ValueError("kind bpe is trained and takes no path; kinds json and sentencepiece need one")
        return self


class MixtureChange(Section):
    """From `step` on, the sources are drawn with these weights."""

    step: Positive
    weights: dict[str, Annotated[float, Field(ge=0)]]


class ExecutorConfig(Section):
    """Where datatrove's cleaning and deduplication tasks run."""

    kind: Literal["local", "slurm", "ray"] = "local"
    tasks: Positive = Field(2, description="pieces the corpus is cut into")
    slurm_partition: str | None = None
    slurm_time: str = "10:00:00"


class DataConfig(Section):
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    validation_fraction: Fraction = Field(0.02, description="share of documents held out, chosen by their digest")
    cleaning: CleaningConfig = CleaningConfig()
    dedup: DedupConfig = DedupConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    mixture: list[MixtureChange] = Field(default_factory=list, description="weights that change at a step")
    executor: ExecutorConfig = ExecutorConfig()
    workers: Annotated[int, Field(ge=0)] = Field(0, description="processes; 0 means one per core")

    @model_validator(mode="after")
    def _names_agree(self) -> DataConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, found {names}")
        for change in self.mixture:
            if unknown := set(change.weights) - set(names):
                raise ValueError(
                    f"mixture at step {change.step} names unknown sources {sorted(unknown)}; known: {names}"
                )
            if not any(change.weights.values()):
                raise ValueError(f"mixture at step {change.step} gives every source weight 0")
        steps = [change.step for change in self.mixture]
        if steps != sorted(set(steps)):
            raise ValueError(f"mixture steps must rise, found {steps}")
        return self
