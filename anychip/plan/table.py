"""Layouts, machines and sites as arrays, so that one pass of the cost model serves 100,000 of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from anychip.plan.shapes import Work
from anychip.plan.types import RECOMPUTES, SCHEDULES, ContextMethod, Floats, Layout, Machine, Site
from anychip.recipe.schema import TWO_STAGE_SCHEDULES

METHODS: tuple[ContextMethod, ...] = ("ring", "all_gather", "ulysses")
MAX_TIERS = 3
# Choices as the indices that a table has for them.
NONE, SELECTIVE, FULL = range(len(RECOMPUTES))
GPIPE, ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE, DUALPIPE_V = range(len(SCHEDULES))


@dataclass(frozen=True)
class Table:
    """Layouts as arrays [n]; names as in `Layout`, choices as indices."""

    dp: Floats
    tp: Floats
    pp: Floats
    vpp: Floats
    cp: Floats
    ep: Floats
    expert_tp: Floats
    expert_node: Floats
    zero: Floats
    shard: Floats  # resolved: ranks that share the states
    sp: Floats
    mbs: Floats
    recompute: Floats  # index into RECOMPUTES
    recompute_layers: Floats
    schedule: Floats  # index into SCHEDULES
    method: Floats  # index into METHODS
    overlap_tensor: Floats
    overlap_data: Floats
    first_layers: Floats  # layers on the first rank, on the fullest inner rank, on the last one
    inner_layers: Floats
    inner_place: Floats  # the first rank that holds so many
    last_layers: Floats

    def __len__(self) -> int:
        return len(self.dp)

    def take(self, index: Any) -> Table:
        return Table(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def table_of(layouts: Sequence[Layout], layers: Floats) -> Table:
    """Arrays of layouts; `layers` (of the model, [] or [n]) settles the split that a layout leaves open."""
    column = {
        name: np.array([getattr(layout, name) for layout in layouts], dtype=np.float64)
        for name in ("dp", "tp", "pp", "vpp", "cp", "ep", "expert_tp", "expert_node", "zero", "recompute_layers")
    }
    shard = np.array([layout.shard for layout in layouts], dtype=np.float64)
    layers = np.broadcast_to(layers, shard.shape)
    pairs = zip(layouts, layers, strict=True)
    ends = np.array([rank_ends(layout, int(count)) for layout, count in pairs], dtype=np.float64).reshape(-1, 4)
    return Table(
        **column,
        shard=np.where(shard > 0, shard, column["dp"] * column["cp"]),
        sp=np.array([layout.sequence_parallel for layout in layouts], dtype=np.float64),
        mbs=np.array([layout.micro_batch for layout in layouts], dtype=np.float64),
        recompute=np.array([RECOMPUTES.index(layout.recompute) for layout in layouts], dtype=np.float64),
        schedule=np.array([SCHEDULES.index(layout.schedule) for layout in layouts], dtype=np.float64),
        method=np.array([METHODS.index(layout.context_method) for layout in layouts], dtype=np.float64),
        overlap_tensor=np.array([layout.overlap_tensor for layout in layouts], dtype=np.float64),
        overlap_data=np.array([layout.overlap_data for layout in layouts], dtype=np.float64),
        first_layers=ends[:, 0],
        inner_layers=ends[:, 1],
        inner_place=ends[:, 2],
        last_layers=ends[:, 3],
    )


def stage_layers(layout: Layout, layers: int) -> list[int]:
    """Layers of each of pp * vpp stages in the model's order. What an even split leaves over goes to the middle, as in
    training: the ends also hold embedding and logits."""
    if layout.stage_layers:
        return list(layout.stage_layers)
    stages = layout.pp * layout.vpp
    base, left = divmod(layers, stages)
    first = (stages - left) // 2
    return [base + (first <= stage < first + left) for stage in range(stages)]


def layers_by_rank(layout: Layout, layers: int) -> list[int]:
    """Layers on each pipeline rank, all its chunks together.

    Stages are dealt as the schedule deals them: stage s lies on rank s mod pp (interleaved), or on the ranks in a V for
    two-chunk schedules.
    """
    ranks = [0] * layout.pp
    for stage, count in enumerate(stage_layers(layout, layers)):
        turn, rank = divmod(stage, layout.pp)
        folded = layout.schedule in TWO_STAGE_SCHEDULES and turn % 2 == 1
        ranks[layout.pp - 1 - rank if folded else rank] += count
    return ranks


def rank_ends(layout: Layout, layers: int) -> tuple[int, int, int, int]:
    """Layers on the first rank, on the fullest inner one, which that is, and on the last."""
    ranks = layers_by_rank(layout, layers)
    inner = max(ranks[1:-1], default=0)
    return ranks[0], inner, ranks.index(inner, 1) if inner else min(1, layout.pp - 1), ranks[-1]


def layout_at(t: Table, index: int) -> Layout:
    """One row of a table as a layout; even splits stay unwritten."""
    whole: dict[str, Any] = {
        name: int(getattr(t, name)[index])
        for name in ("dp", "tp", "pp", "vpp", "cp", "ep", "expert_tp", "expert_node", "zero", "recompute_layers")
    }
    return Layout(
        **whole,
        shard=0 if t.shard[index] == t.dp[index] * t.cp[index] else int(t.shard[index]),
        sequence_parallel=bool(t.sp[index]),
        micro_batch=int(t.mbs[index]),
        recompute=RECOMPUTES[int(t.recompute[index])],
        schedule=SCHEDULES[int(t.schedule[index])],
        context_method=METHODS[int(t.method[index])],
        overlap_tensor=bool(t.overlap_tensor[index]),
        overlap_data=bool(t.overlap_data[index]),
    )


def ends_meet(t: Table) -> npt.NDArray[np.bool_]:
    """Layouts whose first rank also holds the head: one rank alone, or two chunks a rank in a V."""
    folded = (t.schedule >= SCHEDULES.index("zero_bubble")) & (t.vpp == 2)
    return np.asarray((t.pp == 1) | folded)


def micro_batches(w: Work, t: Table) -> Floats:
    """Micro-batches of one pipeline and step, [n]."""
    return np.maximum(1.0, np.floor(w.batch / (t.dp * t.mbs)))


@dataclass(frozen=True)
class Hardware:
    """A machine as arrays, [] or [n]; tiers as [MAX_TIERS] lists of arrays, unused ones equal to the last."""

    peak: Floats  # in the compute type
    half_peak: Floats  # in half precision, where attention stays
    element: Floats  # bytes of an activation
    low_precision: Floats  # 1 where the compute type is narrower than half precision
    memory: Floats
    bandwidth: Floats
    node: Floats  # devices a node
    tier_size: list[Floats]
    tier_bandwidth: list[Floats]
    tier_latency: list[Floats]
    peers: Floats  # of a device in its node that it reaches by a link of their own each; 0: by a switch


def peak_of(machine: Machine, dtype: str) -> float:
    """Dense FLOP/s in `dtype`; halves and doubles are taken for types that the catalogue leaves out."""
    peaks = machine.peak_flops
    order = {"bf16": ("bf16", "fp16"), "fp16": ("fp16", "bf16"), "fp8": ("fp8", "bf16", "fp16"), "fp32": ("fp32",)}
    for name in order.get(dtype, (dtype,)):
        if name in peaks:
            return peaks[name]
    return max(peaks.values())


def hardware_of(machines: Sequence[Machine], dtypes: Sequence[str]) -> Hardware:
    """Arrays of one machine ([]) or of one for each row ([n])."""

    def array(values: Sequence[float]) -> Floats:
        return np.array(values[0] if len(values) == 1 else values, dtype=np.float64)

    tiers = [[*m.tiers, *[m.tiers[-1]] * (MAX_TIERS - len(m.tiers))] for m in machines]
    return Hardware(
        peak=array([peak_of(m, dtype) for m, dtype in zip(machines, dtypes, strict=True)]),
        half_peak=array([peak_of(m, "bf16" if d == "fp8" else d) for m, d in zip(machines, dtypes, strict=True)]),
        element=array([4.0 if dtype == "fp32" else 2.0 for dtype in dtypes]),
        low_precision=array([float(dtype == "fp8") for dtype in dtypes]),
        memory=array([m.memory_bytes for m in machines]),
        bandwidth=array([m.memory_bytes_per_s for m in machines]),
        node=array([m.devices_per_node for m in machines]),
        tier_size=[array([row[level].devices for row in tiers]) for level in range(MAX_TIERS)],
        tier_bandwidth=[array([row[level].bytes_per_s for row in tiers]) for level in range(MAX_TIERS)],
        tier_latency=[array([row[level].latency_s for row in tiers]) for level in range(MAX_TIERS)],
        peers=array([row[0].peers for row in tiers]),
    )


def stack_sites(sites: Sequence[Site]) -> Site:
    """Sites of several rows as one whose numbers are arrays [n]; one site stays as it is."""
    if len({id(site) for site in sites}) == 1:
        return sites[0]
    numbers: dict[str, Any] = {
        field.name: np.array([getattr(site, field.name) for site in sites])
        for field in fields(Site)
        if isinstance(getattr(sites[0], field.name), int | float | bool)
    }
    return replace(sites[0], **numbers)
