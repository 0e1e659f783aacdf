"""Predicting one layout in full, or very many at once.

`predict_many` is the closed form over arrays; `predict` fills in every rank's memory and the interval of one layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from anychip.errors import InputError
from anychip.plan.cost import rank_seconds, step_terms
from anychip.plan.memory import rank_memory
from anychip.plan.ranks import rank_at, rank_of
from anychip.plan.shapes import Work, flops_per_token, work_of
from anychip.plan.table import Hardware, Table, ends_meet, hardware_of, layers_by_rank, layout_at, table_of
from anychip.plan.types import Floats, Layout, Machine, Prediction, Site, Workload, eight_of_ten

GIB = float(2**30)


@dataclass(frozen=True)
class Predictions:
    """What `predict_many` knows of each layout, arrays [n]."""

    workload: Workload
    machine: Machine
    table: Table
    step_seconds: Floats
    tokens_per_second_per_device: Floats
    mfu: Floats
    time: dict[str, Floats]
    memory_bytes: Floats  # of the fullest rank
    fits: np.ndarray

    def __len__(self) -> int:
        return len(self.step_seconds)

    def layout(self, index: int) -> Layout:
        return layout_at(self.table, index)


def predict_many(workload: Workload, layouts: Sequence[Layout] | Table, machine: Machine, site: Site) -> Predictions:
    """Time and memory of many layouts in one pass; layouts are taken to be well-formed (see `refusals`)."""
    w = work_of(workload)
    table = layouts if isinstance(layouts, Table) else table_of(layouts, w.layers)
    hardware = hardware_for(machine, workload, site)
    time = step_terms(w, table, hardware, site)
    seconds = np.asarray(sum(time.values()))
    memory = peak_memory(w, table, site)
    rate = workload.tokens / seconds / (table.dp * table.tp * table.pp * table.cp)
    return Predictions(
        workload=workload,
        machine=machine,
        table=table,
        step_seconds=seconds,
        tokens_per_second_per_device=rate,
        mfu=rate * float(flops_per_token(w)) / hardware.peak,
        time=time,
        memory_bytes=memory,
        fits=memory <= machine.memory_bytes,
    )


def missing_memory(size: float) -> str:
    """GiB, with digits enough that what is missing is never 0.0."""
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else f"{size / GIB:.2g} GiB"


def predict(workload: Workload, layout: Layout, machine: Machine, site: Site) -> Prediction:
    """One layout in full. Raises InputError when the layout cannot exist at all."""
    if refused := refusals(workload, layout, machine):
        raise InputError(f"layout {layout}: {'; '.join(refused)}.", do="Change the degrees so that they divide.")
    many = predict_many(workload, [layout], machine, site)
    w, table = work_of(workload), many.table
    memory = memory_by_rank(w, table, layout, site)
    totals = np.asarray(sum(memory.values()))
    fullest = int(totals.argmax())
    over = totals - machine.memory_bytes
    reasons = tuple(f"stage {rank} is {missing_memory(float(over[rank]))} over" for rank in np.flatnonzero(over > 0))
    step = float(many.step_seconds[0])
    rate = float(many.tokens_per_second_per_device[0])
    return Prediction(
        layout=layout,
        step_seconds=step,
        tokens_per_second_per_device=rate,
        tflops=rate * float(flops_per_token(w)) / 1e12,
        mfu=float(many.mfu[0]),
        time={name: float(np.broadcast_to(value, (1,))[0]) for name, value in many.time.items()},
        stage_seconds=stage_seconds(w, table, layout, hardware_for(machine, workload, site), site),
        memory=memory,
        memory_bytes=float(totals[fullest]),
        fits=not reasons,
        reasons=reasons,
        interval=eight_of_ten(step, site.relative_sigma),
    )


def hardware_for(machine: Machine, workload: Workload, site: Site) -> Hardware:
    """The machine as arrays; what the site has measured comes before the catalogue."""
    return hardware_of([measured(machine, site)], [workload.dtype])


def measured(machine: Machine, site: Site) -> Machine:
    """The machine with the peak and the memory bandwidth that a site has measured of its chip."""
    peaks = machine.peak_flops
    if site.peak_tflops:
        peaks = dict.fromkeys(("fp32", "fp16", "bf16", "fp8"), site.peak_tflops * 1e12)
    bandwidth = site.memory_gb_per_s * 1e9 or machine.memory_bytes_per_s
    if not peaks or not bandwidth:
        raise InputError(
            f"neither the catalogue nor the site knows the peak and the memory bandwidth of {machine.chip}.",
            do="Measure the chip with `anychip bench chip` and give its site file.",
        )
    return replace(machine, peak_flops=peaks, memory_bytes_per_s=bandwidth)


def peak_memory(w: Work, table: Table, site: Site) -> Floats:
    """Bytes of the fullest rank, [n]."""
    return fullest_rank(w, table, site)[0]


def fullest_rank(w: Work, table: Table, site: Site) -> tuple[Floats, Floats]:
    """Bytes of the fullest rank, and which one it is, each [n]: the first, the fullest inner one right after it, or the
    last."""
    places = {"first": np.zeros(len(table)), "inner": table.inner_place, "last": table.pp - 1}
    held = np.stack([
        np.broadcast_to(np.asarray(sum(rank_memory(w, table, rank_at(w, table, where), site).values())), (len(table),))
        for where in places
    ])  # fmt: skip
    chosen, every = held.argmax(axis=0), np.arange(len(table))
    return held[chosen, every], np.stack(list(places.values()))[chosen, every]


def memory_by_rank(w: Work, table: Table, layout: Layout, site: Site) -> dict[str, Floats]:
    """Bytes by term on every pipeline rank of one layout, each [pp]."""
    ranks = np.arange(layout.pp, dtype=np.float64)
    every = table.take(np.zeros(layout.pp, dtype=np.int64))
    layers = np.array(layers_by_rank(layout, int(w.layers)), dtype=np.float64)
    head = 0 if ends_meet(table)[0] else layout.pp - 1
    first, last = (ranks == 0).astype(np.float64), (ranks == head).astype(np.float64)
    terms = rank_memory(w, every, rank_of(w, every, ranks, layers, first, last), site)
    return {name: np.broadcast_to(value, ranks.shape).astype(np.float64) for name, value in terms.items()}


def stage_seconds(w: Work, table: Table, layout: Layout, hardware: Hardware, site: Site) -> Floats:
    """Seconds that each pipeline rank computes for one micro-batch, both directions, [pp]."""
    layers = np.array(layers_by_rank(layout, int(w.layers)), dtype=np.float64)
    forward, backward, _, ends = rank_seconds(w, table, hardware, site)
    seconds = layers * float(forward[0] + backward[0])
    seconds[0] += float(ends.first[0])
    seconds[0 if ends_meet(table)[0] else -1] += float(ends.last[0])
    return np.asarray(seconds)


def refusals(workload: Workload, layout: Layout, machine: Machine) -> list[str]:
    """Why a layout cannot exist for this workload and machine, memory aside."""
    found: list[str] = []
    if layout.devices != machine.devices:
        found.append(f"it needs {layout.devices} devices and {machine.name} has {machine.devices}")
    if workload.heads % layout.tp or (workload.kv_heads % layout.tp and layout.tp % workload.kv_heads):
        found.append(f"{workload.heads} heads of {workload.kv_heads} groups do not divide by TP {layout.tp}")
    if workload.global_batch % (layout.dp * layout.micro_batch):
        found.append(
            f"global batch {workload.global_batch} is not a multiple of dp x micro-batch = "
            f"{layout.dp * layout.micro_batch}"
        )
    if layout.pp * layout.vpp > workload.layers:
        found.append(f"{workload.layers} layers are fewer than {layout.pp * layout.vpp} stages")
    if layout.stage_layers and sum(layout.stage_layers) != workload.layers:
        found.append(f"stage layers add up to {sum(layout.stage_layers)}, not to {workload.layers}")
    if layout.stage_layers and len(layout.stage_layers) != layout.pp * layout.vpp:
        found.append(f"{len(layout.stage_layers)} stage lengths are given for {layout.pp * layout.vpp} stages")
    if workload.seq_length % (layout.cp * (layout.tp if layout.sequence_parallel else 1)):
        found.append(f"sequence length {workload.seq_length} does not divide by its parallel ranks")
    if layout.ep > 1:
        experts = workload.experts.count if workload.experts else 0
        if not experts:
            found.append("expert parallelism needs a model with experts")
        elif experts % layout.ep:
            found.append(f"{experts} experts do not divide by EP {layout.ep}")
        if (layout.dp * layout.cp * layout.tp) % (layout.ep * layout.expert_tp):
            found.append(f"EP {layout.ep} x expert TP {layout.expert_tp} does not divide dp x cp x tp")
    if layout.schedule == "interleaved" and layout.pp > 1 and layout.micro_batches(workload) % layout.pp:
        found.append(f"the interleaved schedule needs micro-batches in multiples of PP {layout.pp}")
    if layout.vpp > 1 and layout.schedule == "1f1b":
        found.append("several chunks a rank need the interleaved schedule")
    return found
