"""Layouts in words and in recipes: what a recipe's `parallel` section means to the planner, and the other way round."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any, get_args

from anychip.errors import InputError
from anychip.plan.rules import trained_zero
from anychip.plan.types import RECOMPUTES, SCHEDULES, ContextMethod, Layout, Workload
from anychip.recipe.schema import TWO_STAGE_SCHEDULES, Recipe

_NUMBERS = {
    "dp": "dp", "tp": "tp", "pp": "pp", "vpp": "vpp", "cp": "cp", "ep": "ep", "epnode": "expert_node",
    "shard": "shard", "mbs": "micro_batch",
}  # fmt: skip
_ZEROS = range(4)


def layout_of(recipe: Recipe, devices: int) -> Layout:
    """The layout that a recipe's `parallel` and `training` sections describe on `devices` devices.

    FSDP2 gathers parameters layer by layer (ZeRO 3), but a stage of a pipeline keeps them, and adds up whole gradients,
    until its last micro-batch (ZeRO 1).
    Raises InputError when the degrees do not make up `devices`.
    """
    parallel = recipe.parallel
    pipelined = parallel.pipeline_parallel > 1
    fixed, replicate = parallel.processes_a_copy, parallel.copies(devices)
    if fixed * replicate != devices:
        raise InputError(
            f"the recipe's layout needs {fixed * replicate} devices, the cluster has {devices}.",
            do=f"Change the degrees in the section parallel, or give --devices with a multiple of {fixed}.",
        )
    folded = parallel.pipeline_schedule in TWO_STAGE_SCHEDULES
    sharded = parallel.data_parallel_shard > 1
    return Layout(
        dp=replicate * parallel.data_parallel_shard,
        tp=parallel.tensor_parallel,
        pp=parallel.pipeline_parallel,
        vpp=(2 if folded else parallel.virtual_pipeline) if pipelined else 1,
        cp=parallel.context_parallel,
        ep=parallel.expert_parallel,
        expert_node=parallel.expert_node_size if 1 < parallel.expert_node_size < parallel.expert_parallel else 0,
        zero=(1 if pipelined else 3) if sharded else 0,
        shard=parallel.data_parallel_shard * parallel.context_parallel if sharded and replicate > 1 else 0,
        micro_batch=recipe.training.micro_batch_size,
        recompute=recipe.training.recompute,
        schedule=parallel.pipeline_schedule,
        context_method=parallel.context_method,
        stage_layers=tuple(parallel.pipeline_layers),
    )


def overrides_of(layout: Layout) -> list[str]:
    """What `--set` must be given so that a recipe trains in this layout, whatever layout it has; sharded states become
    FSDP2."""
    shard = (layout.shard or layout.dp * layout.cp) // layout.cp if layout.zero else 1
    values: dict[str, Any] = {
        "parallel.data_parallel_replicate": layout.dp // shard,
        "parallel.data_parallel_shard": shard,
        "parallel.tensor_parallel": layout.tp,
        "parallel.pipeline_parallel": layout.pp,
        "parallel.context_parallel": layout.cp,
        "parallel.context_method": layout.context_method,
        "parallel.expert_parallel": layout.ep,
        "parallel.expert_node_size": layout.expert_node,
        "parallel.pipeline_schedule": layout.schedule,
        "parallel.virtual_pipeline": layout.vpp if layout.schedule == "interleaved" else 1,
        "parallel.pipeline_layers": "[" + ",".join(map(str, layout.stage_layers)) + "]",
        "training.micro_batch_size": layout.micro_batch,
        "training.recompute": layout.recompute,
    }
    return [f"{name}={value}" for name, value in values.items()]


def parse_layout(
    text: str, workload: Workload, devices: int, *, trained_here: bool = True, context_method: ContextMethod = "ring"
) -> Layout:
    """A layout as it is printed, such as "tp8 pp8 vpp3 mbs1 zero1 recompute-full interleaved".

    What is left out stays as it is by default; without dp, dp is what the other degrees leave of `devices`; without
    zero, states are shared out as this software does it (`trained_here`), or optimizer states alone.
    """
    values: dict[str, Any] = {"context_method": context_method}
    given: dict[str, str] = {}
    for word in text.replace(",", " ").split():
        name, value = _part(word)
        if name in given:
            raise InputError(f"{given[name]} and {word} contradict each other.", do="Give one of them.")
        given[name], values[name] = word, value
    layout = _completed(Layout(**values), given, workload, devices)
    if trained_here and "zero" not in given:
        layout = replace(layout, zero=trained_zero(layout.dp, layout.pp))
    return layout


def _part(word: str) -> tuple[str, Any]:
    """A field of `Layout` and its value."""
    letters = word.rstrip("0123456789")
    digits = word[len(letters) :]
    if letters in _NUMBERS and digits and int(digits) > 0:
        return _NUMBERS[letters], int(digits)
    if letters == "zero" and digits and int(digits) in _ZEROS:
        return "zero", int(digits)
    if word.removeprefix("recompute-") in RECOMPUTES:
        return "recompute", word.removeprefix("recompute-")
    if word in SCHEDULES:
        return "schedule", word
    if word in get_args(ContextMethod):
        return "context_method", word
    if word == "layers":
        raise InputError("layers needs numbers, such as layers11-12-13.", do="Join the layers of stages by -.")
    if word.startswith("layers") and word[6:].replace("-", "").isdigit():
        return "stage_layers", tuple(int(count) for count in word[6:].split("-") if count)
    if word.startswith("recompute"):
        raise InputError(
            f"{word!r} is no part of a layout: training recomputes all layers alike.",
            do="Write " + ", ".join(f"recompute-{kind}" for kind in RECOMPUTES) + ".",
        )
    raise InputError(
        f"{word!r} is no part of a layout.",
        do="Write words such as dp128 tp8 pp8 vpp3 cp1 ring ep1 mbs1 zero1 recompute-full interleaved.",
    )


def _completed(layout: Layout, given: Container[str], workload: Workload, devices: int) -> Layout:
    """Fill in what follows from what was written."""
    if "schedule" not in given and layout.vpp > 1:
        layout = replace(layout, schedule="interleaved")
    if layout.schedule in TWO_STAGE_SCHEDULES and layout.pp > 1:
        if "vpp" in given and layout.vpp != 2:
            raise InputError(f"{layout.schedule} has two stages a process, not {layout.vpp}.", do="Leave vpp out.")
        layout = replace(layout, vpp=2)
    if "dp" not in given:
        layout = replace(layout, dp=max(1, devices // (layout.tp * layout.pp * layout.cp)))
    if layout.devices != devices:
        raise InputError(
            f"layout {layout} needs {layout.devices} devices, there are {devices}.",
            do="Leave dp out to have it follow, or change --devices.",
        )
    if layout.stage_layers and sum(layout.stage_layers) != workload.layers:
        raise InputError(
            f"layers {layout.stage_layers} add up to {sum(layout.stage_layers)}, the model has {workload.layers}.",
            do="Give every stage of the pipeline its layers.",
        )
    return layout
