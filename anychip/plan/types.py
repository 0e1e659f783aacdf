"""What the planner talks about: the work, a layout, a machine, a site's constants, and what is predicted of them.

Units are bytes, seconds, FLOP/s and bytes/s unless a name says otherwise; bandwidths are per device and direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

_TENTH_PERCENTILE = 1.2816  # of a standard normal distribution

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe_v"]
ContextMethod = Literal["ring", "all_gather", "ulysses"]
Dtype = Literal["fp32", "fp16", "bf16", "fp8"]

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipe_v")


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434): queries and keys go through low-rank projections."""

    q_rank: int  # 0: queries are projected directly
    kv_rank: int
    nope_dim: int  # query/key width of a head without position
    rope_dim: int  # query/key width of a head with position; the key's is shared by all heads
    value_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the dense feed-forward of some layers."""

    count: int
    top_k: int
    ffn: int  # inner width of one routed expert
    shared_ffn: int = 0  # total inner width of the experts that see every token
    dense_layers: int = 0  # leading layers that keep the dense feed-forward
    every: int = 1  # of the others, one layer in `every` has experts
    ranking_bias: bool = False  # a router keeps a bias for each expert


@dataclass(frozen=True)
class Workload:
    """One optimizer step of one model: shapes and batch, without any word on how it is split."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    seq_length: int
    global_batch: int  # sequences a step
    dtype: Dtype = "bf16"
    gated: bool = True  # gate, up and down projections instead of up and down
    biases: Literal["none", "telechat2", "all"] = "none"
    norm: Literal["rms", "layer"] = "rms"
    tied_embeddings: bool = False
    learned_positions: int = 0  # rows of a learned position table
    causal: bool = True
    window: int = 0  # tokens that attention looks back; 0: all
    latent: LatentAttention | None = None
    experts: Experts | None = None
    predicted_tokens: int = 0  # multi-token prediction: extra layers after the last one
    loss_chunk_tokens: int = 0  # tokens whose logits exist at one time; 0: all of a micro-batch
    trainable_fraction: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.seq_length * self.global_batch


@dataclass(frozen=True)
class Layout:
    """How a step is split over devices: tp * cp * pp * dp of them. Expert parallelism lives inside dp * cp."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1  # model chunks a pipeline rank holds
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1  # tensor parallelism inside an expert
    expert_node: int = 0  # members of an expert-parallel group in a node, which a token reaches once; 0: each by itself
    zero: int = 1  # 0 none, 1 optimizer, 2 + gradients, 3 + parameters (FSDP)
    shard: int = 0  # ranks that share one copy of the states; 0: all dp * cp of them
    sequence_parallel: bool = True
    micro_batch: int = 1
    recompute: Recompute = "none"
    recompute_layers: int = 0  # full recompute of so many layers of each chunk; 0: of all
    schedule: Schedule = "1f1b"
    context_method: ContextMethod = "ring"
    overlap_tensor: bool = True  # products are cut so that tensor-parallel traffic runs beside them
    overlap_data: bool = True  # gradients are reduced while the backward pass goes on
    stage_layers: tuple[int, ...] = ()  # layers of each of pp * vpp stages in order; empty: as even as can be

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    def micro_batches(self, workload: Workload) -> int:
        """Micro-batches that one pipeline processes a step."""
        return workload.global_batch // (self.dp * self.micro_batch)

    def __str__(self) -> str:
        parts = [f"dp{self.dp}", f"tp{self.tp}", f"pp{self.pp}"]
        degrees = (("vpp", self.vpp), ("cp", self.cp), ("ep", self.ep), ("epnode", self.expert_node))
        parts += [f"{name}{value}" for name, value in (*degrees, ("shard", self.shard)) if value > 1]
        parts += [f"mbs{self.micro_batch}", f"zero{self.zero}", f"recompute-{self.recompute}"]
        if self.cp > 1:
            parts.append(self.context_method)
        if self.pp > 1:
            parts.append(self.schedule)
        return " ".join(parts)


@dataclass(frozen=True)
class LinkTier:
    """A level of the network: blocks of `devices` devices that reach each other at this speed."""

    name: str  # node, supernode, cluster
    devices: int
    bytes_per_s: float
    latency_s: float
    peers: int = 0  # devices that a device reaches by a link of their own each, which share its bandwidth; 0: a switch


@dataclass(frozen=True)
class Machine:
    """Devices of one kind and the network between them. A mixed cluster is a tuple of these."""

    name: str
    chip: str
    devices: int
    devices_per_node: int
    peak_flops: dict[str, float]  # by dtype, dense
    memory_bytes: float
    memory_bytes_per_s: float
    tiers: tuple[LinkTier, ...]  # fastest first; the last one holds all devices
    watts_per_device: float | None = None
    torch_device_type: str = ""
    assumed: tuple[str, ...] = ()  # figures that the catalogue does not know, and what was taken instead

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.devices_per_node)


@dataclass(frozen=True)
class Site:
    """What a chip and its software make of the peaks: few scalars, fitted on measured runs (`anychip plan calibrate`).

    Every efficiency is a fraction of the catalogue's figure.
    """

    name: str
    # Fitted scalars.
    matmul_efficiency: float = 0.8  # of very large products
    matmul_half_area: float = 1.0e6  # output elements at which half of the cores work
    low_precision_efficiency: float = 0.8  # of fp8 products against half-precision ones, conversions included
    attention_efficiency: float = 0.5  # of fused attention over long sequences, always in half precision
    memory_efficiency: float = 0.75
    pointwise_efficiency: float = 1.0  # of memory's rate, in work between products that arithmetic bounds, as on a CPU
    intra_node_efficiency: float = 0.7
    inter_node_efficiency: float = 0.7
    expert_efficiency: float = 0.7  # of routed experts' products against dense ones of their shape: routing, imbalance
    data_overlap: float = 0.0  # share of the data-parallel traffic that may hide behind the backward pass
    tensor_overlap: float = 0.0
    layer_overhead_s: float = 0.0  # time a layer and direction that no size explains: launches, host work
    step_overhead_s: float = 0.0
    # Facts of the software, not fitted.
    expert_imbalance: float = 1.0  # busiest rank of experts over the mean, beyond what runs were fitted with
    matmul_traffic: float = 1.0  # share of a product's operand traffic that does not hide behind its arithmetic
    matmul_fill_length: float = 64.0  # of K, that a tile costs besides: filling the pipeline, writing the result
    fused_attention: bool = True
    causal_skip: bool = True  # fused attention skips the upper triangle
    fused_pointwise: bool = True  # bias, activation, dropout, rope and norm in one kernel each
    dropout: bool = False
    loss_bytes: float = 20.0  # moved for one logit by the loss, both directions; 50 when each of its steps is a kernel
    routes_by_node: bool = False  # a token goes to a node once, however many of its experts are there
    reduce_bytes: int = 4  # of one gradient when it is reduced
    gradient_bytes: int = 4  # main gradient of one parameter in memory
    optimizer_bytes: float = 12.0  # Adam's state of one parameter: fp32 weight and two moments
    logits_bytes: float = 4.0  # held for one logit: the logit and its gradient
    layer_gradient_scratch: float = 1.0  # weight gradients of one layer and of the head beside the accumulated ones
    trained_here: bool = False  # by this software, whose memory is known tensor by tensor (`memory_here`)
    # Memory that no tensor explains.
    reserved_bytes: float = 2.0e9  # device context, collective buffers
    allocator_slack: float = 0.04  # of what tensors take
    # Measured of the chip; 0 takes the catalogue's.
    peak_tflops: float = 0.0
    memory_gb_per_s: float = 0.0
    # How it was obtained.
    relative_sigma: float = 0.1  # spread of log(measured / predicted) held out
    source: str = ""
    chip_family: str = ""  # of the chips it was fitted on; "": of several, or of none in particular


@dataclass(frozen=True)
class Rejected:
    """A layout that cannot run, and why."""

    layout: Layout
    reason: str
    words: str = ""  # what of the layout the reason is about, where the rest could be anything
    kind: str = ""  # under which it is counted; empty: under its reason

    @property
    def name(self) -> str:
        return self.words or str(self.layout)


@dataclass(frozen=True)
class Prediction:
    """What one layout does with one workload on one machine."""

    layout: Layout
    step_seconds: float
    tokens_per_second_per_device: float
    tflops: float  # model TFLOP/s a device, causal attention halved, recomputation not counted
    mfu: float  # tflops over the peak of the compute dtype
    time: dict[str, float]  # seconds by term; they add up to step_seconds
    stage_seconds: Floats  # [stages] forward + backward of one micro-batch on each pipeline rank
    memory: dict[str, Floats]  # bytes by term, each [pp]
    memory_bytes: float  # of the fullest stage
    fits: bool
    reasons: tuple[str, ...]  # why it does not fit; empty when it does
    interval: tuple[float, float] = (0.0, 0.0)  # step seconds, 10th and 90th percentile by the site's spread

    @property
    def memory_by_stage(self) -> Floats:
        """Bytes on each pipeline rank, [pp]."""
        return np.asarray(sum(self.memory.values()), dtype=np.float64)


@dataclass(frozen=True)
class Event:
    """One piece of work of a pipeline rank in the simulated timeline."""

    stage: int  # pipeline rank
    chunk: int  # which of the rank's model chunks
    micro_batch: int
    kind: Literal["forward", "backward", "weight"]
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    events: tuple[Event, ...]
    seconds: float
    stages: int

    @property
    def bubble_fraction(self) -> float:
        """Share of the ranks' time in which they wait."""
        busy = sum(event.end - event.start for event in self.events)
        return 1.0 - busy / (self.seconds * self.stages) if self.seconds else 0.0


@dataclass(frozen=True)
class SearchResult:
    best: list[Prediction]
    rejected: Sequence[Rejected]
    considered: int  # layouts evaluated by the closed form
    seconds: float
    notes: tuple[str, ...] = field(default=())


def eight_of_ten(middle: float, sigma: float) -> tuple[float, float]:
    """The 10th and 90th percentile around a median, when the logarithm has a normal spread of `sigma`."""
    spread = math.exp(_TENTH_PERCENTILE * sigma)
    return middle / spread, middle * spread
