"""Training: steps and batches by Megatron's names, layout, growth, optimizer, checkpoints, guard, log."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from anychip.recipe.schema.section import Count, Fraction, Positive, Section


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
