"""What is asked of the planner: a recipe's step on machines that a file, a chip's name or a measurement describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from anychip.chips.catalog import find_chip
from anychip.errors import InputError
from anychip.plan.calibrate import BASES, base_site, chip_family
from anychip.plan.local import machine_of_bench, memory_here, read_bench, site_of_bench
from anychip.plan.machine import ASSUMED_INTER_NODE_GBIT_PER_S, machines_of
from anychip.plan.models import ModelStage, model_stages
from anychip.plan.rows import Software
from anychip.plan.sites import default_site, load_site, trained_here
from anychip.plan.types import Machine, Site, Workload
from anychip.recipe import Recipe, load_recipe
from anychip.recipe.cluster import Cluster, FailureConfig, NodeGroup, load_cluster

HERE = "anychip"
SOFTWARE = (HERE, *BASES)
_MEMORY = (
    "gradient_bytes", "optimizer_bytes", "logits_bytes", "layer_gradient_scratch", "reserved_bytes", "allocator_slack",
    "fused_attention", "dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """Machines of one kind, or of several that are to share a pipeline; a site for each. A recipe that grows asks once
    for each of its models."""

    recipe: Recipe
    models: tuple[ModelStage, ...]
    name: str  # of the cluster
    machines: tuple[Machine, ...]
    sites: tuple[Site, ...]
    failures: FailureConfig
    between_bytes_per_s: float  # what one device sends to a device of another kind

    @property
    def grows(self) -> bool:
        """Whether there is more than one answer."""
        return len(self.models) > 1


def ask(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: Path | None = None,
    chip: str | None = None,
    devices: int | None = None,
    seq_length: int | None = None,
    site: str | None = None,
    bench: Path | None = None,
    model_stage: int | None = None,
    tokens: float | None = None,
    software: str = HERE,
) -> Question:
    """Read what the flags of `anychip plan` name. Raises InputError when they name no machine, or contradict.

    `software` is what is to train, and its memory is counted: this one, or one of `calibrate.BASES`.
    """
    if software not in SOFTWARE:
        raise InputError(f"--software is {software!r}.", do=f"Allowed: {', '.join(SOFTWARE)}.")
    read = load_recipe(recipe, overrides)
    models = model_stages(read, tokens, model_stage)
    if seq_length is not None:
        models = [replace(model, workload=with_seq_length(model.workload, seq_length)) for model in models]
    if devices is not None and devices < 1:
        raise InputError(f"--devices is {devices}.", do="Give at least 1.")
    if bench is not None and software != HERE:
        raise InputError("--bench measures our own operators, and --software names others'.", do="Leave one out.")
    if bench is not None:
        return _of_bench(read, models, bench, devices or 1, site)
    if cluster is not None:
        asked = changed_cluster(load_cluster(cluster), chip, devices)
    elif chip is not None and devices is not None:
        asked = cluster_of(chip, devices)
    else:
        raise InputError("there is nothing to plan on.", do="Give --cluster FILE, or --chip with --devices.")
    machines = machines_of(asked)
    if site is not None and len(machines) > 1:
        raise InputError(f"{asked.name} has {len(machines)} kinds of nodes, and --site names one.", do="Leave it out.")
    between = asked.between_groups_gbit_per_s or ASSUMED_INTER_NODE_GBIT_PER_S
    return Question(
        recipe=read,
        models=tuple(models),
        name=asked.name,
        machines=machines,
        sites=tuple(_site_of(machine.chip, site, software) for machine in machines),
        failures=asked.failures,
        between_bytes_per_s=between * 1e9 / 8,
    )


def with_imbalance(question: Question, imbalance: float | None) -> Question:
    """The question if the busiest rank of experts had `imbalance` times the mean load; None changes nothing."""
    if imbalance is None:
        return question
    if not any(model.workload.experts for model in question.models):
        raise InputError(
            "--expert-imbalance is for models with experts, and this one has none.", where=question.name, do="Omit it."
        )
    most = max(model.workload.experts.count for model in question.models if model.workload.experts)
    if not 1 <= imbalance <= most:
        raise InputError(
            f"--expert-imbalance is {imbalance:g}; it is the busiest rank's load over the mean.",
            do=f"Give 1 (even) to {most} (all tokens choose one expert).",
        )
    return replace(question, sites=tuple(replace(site, expert_imbalance=imbalance) for site in question.sites))


def _of_bench(recipe: Recipe, models: list[ModelStage], path: Path, processes: int, site: str | None) -> Question:
    """The machine that was measured, which trains in the type that it would choose."""
    bench = read_bench(path)
    if recipe.training.compute_dtype == "auto" and not bench.get("bf16_in_hardware", True):
        models = [replace(model, workload=replace(model.workload, dtype="fp32")) for model in models]
    machine = machine_of_bench(bench, processes, memory_here())
    chosen = load_site(site) if site else site_of_bench(bench, models[0].workload.dtype, processes)
    return Question(recipe, tuple(models), machine.name, (machine,), (trained_here(chosen),), FailureConfig(), 0.0)


def _site_of(chip: str, site: str | None, software: str) -> Site:
    """Speeds of a site, by default that of the chip, and the memory of the software that is to train."""
    if software == HERE:
        return trained_here(load_site(site) if site else default_site(chip))
    if site is not None:
        return load_site(site)
    name = cast(Software, software)
    speeds, own = default_site(chip, name), base_site(name, chip_family(chip))
    memory: dict[str, Any] = {field: getattr(own, field) for field in _MEMORY}
    return replace(speeds, name=f"{speeds.name}, memory of {software}", **memory)


def cluster_of(chip: str, devices: int) -> Cluster:
    """A cluster of one chip without a file; what the catalogue does not know is assumed and said."""
    per_node = min(devices, find_chip(chip).devices_per_node or devices)
    group = NodeGroup(name=chip, chip=chip, nodes=_whole_nodes(devices, per_node), devices_per_node=per_node)
    return Cluster(name=f"{chip}-{devices}", groups=[group])


def changed_cluster(cluster: Cluster, chip: str | None, devices: int | None) -> Cluster:
    """The cluster with another chip (then with the catalogue's links) or another number of devices."""
    if chip is None and devices is None:
        return cluster
    if len(cluster.groups) > 1:
        raise InputError(
            f"{cluster.name} has {len(cluster.groups)} kinds of nodes, so --chip and --devices do not say which.",
            do="Change the cluster file.",
        )
    machine = machines_of(cluster)[0]
    devices = devices or machine.devices
    if chip is not None:
        return cluster_of(chip, devices).model_copy(update={"failures": cluster.failures})
    nodes = _whole_nodes(devices, machine.devices_per_node)
    return cluster.model_copy(update={"groups": [cluster.groups[0].model_copy(update={"nodes": nodes})]})


def _whole_nodes(devices: int, per_node: int) -> int:
    if devices % per_node:
        raise InputError(
            f"{devices} devices are not whole nodes of {per_node}.", do=f"Give --devices as a multiple of {per_node}."
        )
    return devices // per_node


def with_seq_length(workload: Workload, seq_length: int) -> Workload:
    """The workload with longer or shorter sequences and the same tokens a step."""
    if seq_length < 1 or workload.tokens % seq_length:
        raise InputError(
            f"--seq-length {seq_length} does not divide the {workload.tokens:,} tokens of a step.",
            do="Give a length that divides them, or change training.global_batch_size as well.",
        )
    return replace(workload, seq_length=seq_length, global_batch=workload.tokens // seq_length)
