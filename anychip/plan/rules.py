"""What keeps a layout out of the search: a machine that it does not suit, and what this software does not train."""

from __future__ import annotations

from anychip.plan.types import Layout, Machine, Schedule, Site, Workload
from anychip.recipe.schema import TWO_STAGE_SCHEDULES

_LEAST_TOKENS = 1024  # that context parallelism should leave a rank


def left_out(workload: Workload, layout: Layout, machine: Machine, site: Site) -> tuple[str, ...]:
    """Why the search does not offer a layout that divides; empty when it may. Memory is another question."""
    found = [misfit(workload, machine, layout.tp, layout.pp, layout.cp)]
    if layout.pp > 1:
        count = layout.micro_batches(workload)
        found.append(lacks_micro_batches(layout.schedule, layout.pp, count, site.trained_here))
    if site.trained_here:
        found += [
            untrained_degrees(workload, layout.tp, layout.pp, layout.cp),
            unshared(layout),
            _unwritable(layout),
        ]
    return tuple(reason for reason in found if reason)


def misfit(workload: Workload, machine: Machine, tp: int, pp: int, cp: int) -> str:
    """Why these degrees do not suit a model or a machine; empty when they do."""
    if tp > machine.tiers[0].devices and len(machine.tiers) > 1 and machine.tiers[1].name != "supernode":
        return f"TP {tp} crosses nodes"
    if len(machine.tiers) > 1 and tp > machine.tiers[1].devices:
        return f"TP {tp} crosses super-nodes"
    if workload.kv_heads % tp and tp % workload.kv_heads:
        return f"{workload.kv_heads} groups of heads do not divide by TP {tp}"
    if machine.devices % (tp * pp * cp):
        return f"TP x PP x CP = {tp * pp * cp} does not divide {machine.devices} devices"
    if workload.seq_length % (tp * cp):
        return f"sequence length {workload.seq_length} does not divide by TP x CP = {tp * cp}"
    if cp > 1 and workload.seq_length // cp < _LEAST_TOKENS:
        return f"CP {cp} leaves {workload.seq_length // cp} tokens a rank"
    return ""


def untrained_degrees(workload: Workload, tp: int, pp: int, cp: int) -> str:
    """What the training code has no way to split (`parallel.layout` refuses it too), or the plan no way to count."""
    if tp > 1 and (workload.experts or workload.latent):
        return f"the plan cannot count experts and latent attention split by TP {tp}"
    for name, size in (("groups of heads", workload.kv_heads), ("of the feed-forward", workload.ffn),
                       ("of the vocabulary", workload.vocab)):  # fmt: skip
        if size % tp:
            return f"training does not split {size} {name} by TP {tp}"
    if pp > 1 and (workload.tied_embeddings or workload.predicted_tokens):
        return "tied embeddings and modules for further tokens do not go through a pipeline"
    if cp > 1 and workload.predicted_tokens:
        return "modules for further tokens look at whole sequences, which CP takes apart"
    if cp > 1 and workload.seq_length % (2 * cp * tp):
        return f"sequence length {workload.seq_length} does not divide by 2 x CP x TP = {2 * cp * tp}"
    return ""


def lacks_micro_batches(schedule: Schedule, pp: int, count: int, trained_here: bool) -> str:
    """Why `count` micro-batches do not do for a schedule over `pp` ranks."""
    if schedule == "interleaved" and count % pp:
        return f"interleaved needs micro-batches in multiples of PP {pp}, there are {count}"
    if schedule in TWO_STAGE_SCHEDULES and count < 2 * pp:
        return f"{schedule} needs {2 * pp} micro-batches, there are {count}"
    if schedule == "1f1b" and trained_here and count < pp:
        return f"1f1b needs {pp} micro-batches, there are {count}"
    return ""


def trained_zero(dp: int, pp: int) -> int:
    """What FSDP2 comes to: parameters gathered layer by layer, or kept by a stage until its last micro-batch."""
    return 0 if dp == 1 else 1 if pp > 1 else 3


def unshared(layout: Layout) -> str:
    """Why training does not share the states out as the layout says: it shards by FSDP2, or not at all."""
    if layout.zero and layout.dp == 1 and layout.cp > 1:
        return f"states are shared among shards, and with dp1 there are none (zero0, not zero{layout.zero})"
    if layout.zero and layout.dp > 1 and layout.zero != trained_zero(layout.dp, layout.pp):
        if layout.pp > 1:
            return (
                f"a stage of a pipeline keeps its weights and whole gradients (zero0 or zero1, not zero{layout.zero})"
            )
        return f"without a pipeline shards gather weights layer by layer (zero0 or zero3, not zero{layout.zero})"
    if layout.ep > 1:
        shards = (layout.shard or layout.dp * layout.cp) // layout.cp if layout.zero else 1
        if shards % layout.ep:
            return f"experts are shared among shards, and EP {layout.ep} does not divide {shards} of them"
    return ""


def _unwritable(layout: Layout) -> str:
    """What a recipe has no words for."""
    if layout.cp > 1 and layout.context_method == "ulysses":
        return "training has no ulysses (ring and all_gather)"
    if layout.pp > 1 and layout.schedule == "interleaved" and layout.vpp == 1:
        return "interleaved needs several stages a process (vpp)"
    return ""
