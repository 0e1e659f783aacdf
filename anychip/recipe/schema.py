"""The recipe: every number of a run, from corpus to chat, in one schema.

Model fields carry Hugging Face `config.json` names, training fields Megatron's. Lengths are in tokens, times in
seconds, sizes in bytes, unless a name says otherwise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

SCHEMA_VERSION = 1

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A section refuses fields it does not know, so that a typing mistake never passes silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RopeScaling(Section):
    """TeleChat2's dynamic NTK: base and attention scale follow the sequence length in steps."""

    base_length: Positive = Field(8192, description="published `base_seqlen`: the length one NTK step covers")
    training_length: Positive = Field(8192, description="published `training_seqlen`: no scaling up to this length")
    cached_keys: Literal["rerotate", "published"] = Field(
        "rerotate",
        description="rerotate: cached keys follow when the base steps up, so every token is scored by the rule of its "
        "own length; published: they keep the old base and tables are rounded to fp16, as the published code does",
    )


class YarnScaling(Section):
    """YaRN (arXiv 2309.00071): low frequencies are stretched by `factor`, high ones stay, and scores are scaled."""

    factor: Annotated[float, Field(ge=1)] = Field(description="how many times longer than the original context")
    original_max_position_embeddings: Positive = Field(description="the original context in tokens")
    beta_fast: Annotated[float, Field(gt=0)] = Field(
        32.0, description="turns within the original context above which a frequency stays"
    )
    beta_slow: Annotated[float, Field(gt=0)] = Field(1.0, description="turns below which it is stretched in full")
    mscale: Annotated[float, Field(ge=0)] = Field(
        0.1, description="queries and keys are scaled by mscale * ln(factor) + 1; TeleChat3 has 0.07"
    )


Family = Literal["telechat2", "telechat2-moe", "telechat3", "telechat3-moe", "teleflm", "llama"]


class ModelConfig(Section):
    """A decoder of the TeleChat families. Shapes follow from these numbers alone."""

    preset: str | None = Field(None, description="a published model to start from, such as telechat2-7b")
    family: Family = Field("telechat2", description="whose layout of published weights and configuration it has")
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    kv_channels: Positive | None = Field(
        None,
        description="width of a head (`head_dim` of config.json); default: hidden_size / num_attention_heads",
    )
    biases: Literal["telechat2", "none"] = Field(
        "telechat2", description="telechat2: on the attention output and the down projections, nowhere else"
    )
    tie_word_embeddings: bool = Field(False, description="the output head is the input embedding")
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    rope_scaling: RopeScaling | None = None
    yarn: YarnScaling | None = None
    max_position_embeddings: Positive = 8192
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    # muP (arXiv 2203.03466), by the names of Tele-FLM's config.json
    input_mult: Annotated[float, Field(gt=0)] = Field(1.0, description="muP: embeddings are multiplied by it")
    output_mult: Annotated[float, Field(gt=0)] = Field(
        1.0, description="muP: logits are multiplied by output_mult / mup_scale_factor"
    )
    mup_scale_factor: Annotated[float, Field(gt=0)] = Field(1.0, description="muP: width over that of the base model")
    # Multi-head latent attention (arXiv 2405.04434)
    kv_lora_rank: Count = Field(
        0, description="latent attention: width of what keys and values are made from; 0: plain attention"
    )
    q_lora_rank: Count = Field(0, description="latent attention: width of what queries are made from; 0: the input")
    qk_nope_head_dim: Count = Field(0, description="latent attention: width of a query or key without position")
    qk_rope_head_dim: Count = Field(0, description="latent attention: width with position; all heads share the key's")
    v_head_dim: Count = Field(0, description="latent attention: width of a value")
    # Mixture of experts, by the names of DeepSeek-V3's config.json
    n_routed_experts: Count = Field(0, description="experts that tokens choose from; 0: none")
    num_experts_per_tok: Count = Field(0, description="experts that a token chooses")
    moe_intermediate_size: Count = Field(0, description="inner width of an expert")
    n_shared_experts: Count = Field(0, description="experts that see every token; together they are one wider expert")
    first_k_dense_replace: Count = Field(0, description="first layers that have a plain MLP instead")
    scoring_func: Literal["softmax", "sigmoid"] = Field("softmax", description="from router logits to scores")
    topk_method: Literal["greedy", "noaux_tc"] = Field(
        "greedy", description="noaux_tc: experts are chosen by score plus a bias that balances their load (2408.15664)"
    )
    norm_topk_prob: bool = Field(True, description="the chosen scores are divided by their sum")
    routed_scaling_factor: Annotated[float, Field(gt=0)] = 1.0
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the loss that balances experts within each sequence (2412.19437, eq. 17)"
    )
    router_z_loss_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the loss that keeps router logits small (2202.08906)"
    )
    moe_capacity_factor: Annotated[float, Field(ge=0)] = Field(
        0.0, description="an expert takes this many times its even share of a micro-batch, no more; 0: no limit"
    )
    # Multi-token prediction (arXiv 2412.19437, section 2.2)
    num_nextn_predict_layers: Count = Field(0, description="modules that predict one token further each, in training")
    mtp_loss_scaling_factor: Annotated[float, Field(ge=0)] = Field(
        0.2, description="weight of the mean loss of those modules"
    )

    @property
    def head_dim(self) -> int:
        """Width of a query or a key."""
        if self.latent:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Width of the part of a query or key that turns with position."""
        return self.qk_rope_head_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.v_head_dim if self.latent else self.head_dim

    @property
    def latent(self) -> bool:
        """Whether attention is latent."""
        return self.kv_lora_rank > 0

    @property
    def logit_scale(self) -> float:
        return self.output_mult / self.mup_scale_factor

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts in place of its MLP; modules that predict further tokens
        count on behind the last one."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @model_validator(mode="after")
    def _shapes_divide(self) -> ModelConfig:
        if not self.latent and self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2:
            if self.latent:
                raise ValueError(f"qk_rope_head_dim {self.rotary_dim} must be even for RoPE")
            raise ValueError(f"head_dim {self.head_dim} (hidden_size / num_attention_heads) must be even for RoPE")
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> ModelConfig:
        if self.rope_scaling is not None and self.yarn is not None:
            raise ValueError("rope_scaling (dynamic NTK) and yarn exclude each other")
        if self.biases != "none" and not self.family.startswith("telechat2"):
            raise ValueError(f"family {self.family} has no biases: set biases to none")
        return self

    @model_validator(mode="after")
    def _latent_attention_is_whole(self) -> ModelConfig:
        widths = {name: getattr(self, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
        if not self.latent:
            if self.q_lora_rank or any(widths.values()):
                raise ValueError("q_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim need kv_lora_rank")
            return self
        if missing := [name for name, width in widths.items() if not width]:
            raise ValueError(f"latent attention (kv_lora_rank {self.kv_lora_rank}) needs {', '.join(missing)}")
        if self.v_head_dim > self.head_dim:
            raise ValueError(f"v_head_dim {self.v_head_dim} is above the width of keys, {self.head_dim}")
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("latent attention has as many num_key_value_heads as num_attention_heads")
        if self.rope_scaling is not None:
            raise ValueError("latent attention goes with yarn, not with rope_scaling (dynamic NTK)")
        return self

    @model_validator(mode="after")
    def _experts_are_whole(self) -> ModelConfig:
        if not self.n_routed_experts:
            if self.num_experts_per_tok or self.moe_intermediate_size or self.n_shared_experts:
                raise ValueError(
                    "num_experts_per_tok, moe_intermediate_size and n_shared_experts need n_routed_experts"
                )
            return self
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be 1 to {self.n_routed_experts} "
                "(n_routed_experts)"
            )
        if not self.moe_intermediate_size:
            raise ValueError("experts need moe_intermediate_size")
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} leaves none of {self.num_hidden_layers} layers "
                "with experts"
            )
        return self


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


class TrainingConfig(Section):
    seq_length: Positive = 512
    micro_batch_size: Positive = 8
    global_batch_size: Positive = 8
    steps: Positive
    compute_dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 on a chip that multiplies bf16 matrices in hardware, else fp32"
    )
    document_mask: bool = Field(
        False, description="attention stays inside a document, where several share a sample; else it sees them all"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "selective", description="selective: compute norms and SwiGLU again in backward; full: whole layers"
    )
    compile: bool = Field(False, description="torch.compile the decoder layer; pays on long runs")
    loss_chunk_tokens: Positive = Field(512, description="tokens whose logits exist at one time")
    eval_interval: Annotated[int, Field(ge=0)] = Field(100, description="steps between validations; 0: only at the end")
    eval_tokens: Positive = Field(65_536, description="validation tokens read each time")
    operators: dict[str, Literal["vendor", "reference"]] = Field(
        default_factory=dict, description="reference: this operator in plain PyTorch, even where the chip has its own"
    )
    deterministic: bool = Field(False, description="refuse operators without a deterministic implementation")

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainingConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        return self


TWO_STAGE_SCHEDULES = ("zero_bubble", "dualpipe_v")  # their processes hold two stages, in a V


class ParallelConfig(Section):
    """How a model and its batches are split over processes. The product of all degrees is the number of processes."""

    data_parallel_replicate: Positive | None = Field(
        None, description="copies of the (sharded) model; default: as many as the other degrees leave"
    )
    data_parallel_shard: Positive = Field(1, description="processes that share one copy's parameters (FSDP2)")
    tensor_parallel: Positive = Field(1, description="processes that split each matrix, and the sequence between them")
    pipeline_parallel: Positive = Field(1, description="processes that each hold a run of layers")
    context_parallel: Positive = Field(1, description="processes that split each sequence inside attention")
    expert_parallel: Positive = Field(1, description="processes that share the experts; part of data_parallel_shard")
    expert_node_size: Count = Field(
        0,
        description="neighbours of an expert-parallel group that share a node: a token then crosses to another node "
        "once, not once for each of its experts there; 0: all-to-all goes directly",
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe_v"] = Field(
        "1f1b", description="interleaved takes virtual_pipeline stages a process; zero_bubble and dualpipe_v take two"
    )
    virtual_pipeline: Positive = Field(1, description="stages a process")
    pipeline_layers: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="layers of each stage, in order; default: as even as can be"
    )
    host_transfers: bool = Field(
        False, description="pipeline stages on chips of different makes: what they send goes through host memory"
    )
    context_method: Literal["ring", "all_gather"] = Field(
        "ring", description="ring: keys travel in turn, least memory; all_gather: all keys at once"
    )

    @property
    def processes_a_copy(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.pipeline_parallel * self.data_parallel_shard * self.context_parallel * self.tensor_parallel

    def copies(self, world_size: int) -> int:
        """Copies of the model: those asked for, or as many as `world_size` processes hold (one at least)."""
        return self.data_parallel_replicate or max(1, world_size // self.processes_a_copy)


class GrowthConfig(Section):
    """The model becomes a larger one during training, and computes the same right after."""

    at_tokens: Positive = Field(description="training tokens before it; the next whole step is taken")
    to: Annotated[dict[str, JsonValue], Field(min_length=1)] = Field(
        description="model fields and their new values, such as hidden_size or num_hidden_layers"
    )
    mode: Literal["immediate", "masked"] = Field(
        "immediate",
        description="immediate: new units are copies whose products share the old ones' weights; masked: they are "
        "fresh, and their weights open from 0 to 1 over `open_steps`",
    )
    open_steps: Positive = Field(100, description="masked: steps until new parts count in full")
    layers: Literal["even", "top", "distance"] = Field(
        "even", description="where new layers stand; distance: behind those that change their input least"
    )
    noise: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="immediate: how unequally copies share a weight, as a fraction; 0: equal copies stay equal"
    )
    moments: Literal["map", "reset"] = Field(
        "map", description="the optimizer's moments: scaled as gradients change (new parts count their own steps), or 0"
    )
    rewarm_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps in which the learning rate rises again from `rewarm_from` of its value"
    )
    rewarm_from: Annotated[float, Field(ge=0, le=1)] = 0.1
    lr_rule: Literal["keep", "mup"] = Field(
        "keep",
        description="mup: AdamW's rate of matrices and the head falls as the width rises (arXiv 2203.03466, table 3)",
    )


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    decay_fraction: Fraction = Field(0.2, description="wsd: last share of the steps, in which the rate falls")
    min_lr_fraction: Fraction = Field(0.1, description="final rate over peak rate")


class OptimizerConfig(Section):
    name: Literal["adamw", "muon"] = Field("adamw", description="muon: matrices by Muon, everything else by AdamW")
    lr: Annotated[float, Field(gt=0)] = Field(3e-4, description="peak rate; Muon's updates are scaled to AdamW's size")
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    grad_clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0: no clipping")
    router_bias_update_rate: Annotated[float, Field(ge=0)] = Field(
        0.001, description="how far a step moves the bias of an expert (model.topk_method noaux_tc) against its load"
    )
    schedule: ScheduleConfig = ScheduleConfig()


class CheckpointConfig(Section):
    save_interval: Annotated[int, Field(ge=0)] = Field(200, description="steps between saves; 0: only at the end")
    keep: Annotated[int, Field(ge=0)] = Field(2, description="newest checkpoints kept; 0: all")
    asynchronous: bool = True
    memory_interval: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between copies in the hosts' memory, which outlive the processes; 0: none"
    )
    memory_peers: Annotated[int, Field(ge=0)] = Field(
        1, description="other hosts that keep what a host copies, as far as there are others; 0: it dies with its host"
    )


class GuardConfig(Section):
    """What happens to a step whose loss or gradient norm is not finite, or whose gradient norm explodes. In no case
    does it change a weight."""

    on_bad_step: Literal["stop", "skip", "rollback"] = Field(
        "stop", description="rollback: back to the newest checkpoint, and on behind the batches that led here"
    )
    explosion: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a gradient norm this many times its median of the last `window` steps is bad; 0: off"
    )
    window: Annotated[int, Field(ge=8)] = 100
    patience: Positive = Field(
        10,
        description="bad steps or damaged batches in a row, rollbacks, or faults of one rank, after which a run stops",
    )
    on_damaged_data: Literal["stop", "skip"] = Field(
        "stop", description="skip: a batch with tokens that are not what was packed is left out, on all processes"
    )
    digest_interval: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between comparisons of all copies of weights and optimizer state; 0: never"
    )
    replay_interval: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between those in which each process computes a micro-batch of another again; 0: never"
    )
    replay_tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="difference over a gradient's norm that is no fault in a replay; 0: none, bit for bit"
    )


class LogConfig(Section):
    interval: Positive = Field(10, description="steps between log lines")
    tensorboard: bool = True


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

    sources: Annotated[list[DialogSource], Field(min_length=1)] = [DialogSource(path="python:docstrings")]
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
    rewards: Annotated[list[RewardConfig], Field(min_length=1)] = [RewardConfig(kind="exact")]
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


class ServeConfig(Section):
    sampling: SamplingConfig = SamplingConfig()


class AttestConfig(Section):
    """What a run writes down so that others can check where its weights come from, and which chips may take part."""

    record: bool = Field(False, description="keep the chain in attest/; so does every policy below")
    allow_vendors: list[str] = Field(
        default_factory=list, description="the only vendors or makers whose chips may train; empty: all"
    )
    deny_vendors: list[str] = Field(default_factory=list, description="vendors or makers whose chips may not train")
    deny_country: list[Annotated[str, Field(pattern=r"^[A-Za-z]{2}$")]] = Field(
        default_factory=list, description="countries (two letters) whose makers' chips may not train"
    )

    @property
    def active(self) -> bool:
        return self.record or bool(self.allow_vendors or self.deny_vendors or self.deny_country)


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
