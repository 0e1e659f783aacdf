"""A recipe and a cluster put together: which nodes run how many processes, and what cannot be started is refused."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from math import gcd, lcm

from anychip.chips.catalog import Chip, find_chip
from anychip.chips.detect import known_backends, load_backend
from anychip.chips.facts import VendorFacts
from anychip.errors import InputError
from anychip.parallel.layout import check_batch, check_layout, resolve_layout
from anychip.recipe.cluster import Cluster, LaunchConfig, NodeGroup
from anychip.recipe.schema import Recipe

_LONGEST_NAME = 40  # of the 63 characters of a DNS label: operators append a role and a number
ONE_GROUP = ("slurm", "kubernetes", "ascendjob")
IN_CONTAINERS = ("kubernetes", "volcano", "ascendjob")


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind: `processes` on each, one a device as PyTorch counts them."""

    name: str
    count: int
    processes: int
    chip: Chip


@dataclass(frozen=True)
class Job:
    """Everything that a script or manifest needs. Nodes are numbered through the groups in the cluster file's order."""

    recipe: Recipe
    launch: LaunchConfig
    groups: tuple[Nodes, ...]
    facts: VendorFacts
    least_hosts: int = 0  # to go on with under `anychip supervise`; 0: torchrun starts the processes

    @property
    def name(self) -> str:
        """The recipe's name as a DNS label."""
        label = re.sub(r"[^a-z0-9]+", "-", self.recipe.name.lower())[:_LONGEST_NAME].strip("-")
        return f"job-{label}".strip("-") if not label[:1].isalpha() else label

    @property
    def python(self) -> str:
        """The interpreter on the nodes. Hosts share the file system that anychip is installed on; an image does not."""
        return self.launch.python or ("python" if self.launch.kind in IN_CONTAINERS else sys.executable)

    @property
    def nodes(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def world_size(self) -> int:
        return sum(group.count * group.processes for group in self.groups)


def job_of(recipe: Recipe, cluster: Cluster, least_hosts: int = 0) -> Job:
    """Raises InputError when this recipe cannot be started on this cluster, with the nearest that can."""
    groups = tuple(_nodes(group) for group in cluster.groups)
    job = Job(recipe, cluster.launch, groups, _facts(groups[0]), least_hosts)
    _check_chips(job)
    _check_layout(job, cluster)
    _check_launcher(job)
    return job


def _nodes(group: NodeGroup) -> Nodes:
    chip = find_chip(group.chip)
    processes = group.devices_per_node or chip.devices_per_node
    if chip.dies is not None:
        raise InputError(
            f"group {group.name}: {chip.id} is a package of {chip.dies} devices.",
            do="Name the die's entry of the catalogue, which is what PyTorch counts.",
        )
    if processes is None:
        raise InputError(
            f"group {group.name}: nobody has published how many {chip.name} a node has.",
            do="Give the group's devices_per_node.",
        )
    return Nodes(group.name, group.nodes, processes, chip)


def _facts(group: Nodes) -> VendorFacts:
    if group.chip.vendor not in known_backends():
        raise InputError(
            f"group {group.name}: anychip has no backend for {group.chip.maker}.",
            do="Plan with it, or add a backend (docs/en/chips.md).",
        )
    return load_backend(group.chip.vendor).facts


def _check_chips(job: Job) -> None:
    """All processes of a job meet in one group, so their libraries must talk to each other."""
    libraries = {group.name: _facts(group).collectives.library for group in job.groups}
    if len({group.chip.vendor for group in job.groups}) > 1:
        told = ", ".join(f"{name} has {library}" for name, library in libraries.items())
        raise InputError(
            f"the groups have no collective library in common ({told}).",
            where="groups",
            do="Launch on one group. `anychip plan` says what a mixture would bring.",
        )


def _check_layout(job: Job, cluster: Cluster) -> None:
    recipe, training = job.recipe, job.recipe.training
    parallel = recipe.parallel
    unit = parallel.processes_a_copy
    needed = unit * (parallel.data_parallel_replicate or 1)
    have = job.world_size
    if have % unit if parallel.data_parallel_replicate is None else have != needed:
        raise InputError(
            f"the layout of recipe {recipe.name} needs {'a multiple of ' * (parallel.data_parallel_replicate is None)}"
            f"{needed} devices; cluster {cluster.name} has {have}.",
            where="parallel",
            do=_nearest(job, needed, unit, exact=parallel.data_parallel_replicate is not None),
        )
    layout = resolve_layout(parallel, have)
    for model in recipe.models:
        check_layout(parallel, layout, model)
    check_batch(parallel, layout, training.seq_length, training.micro_batch_size, training.global_batch_size)


def _nearest(job: Job, needed: int, unit: int, *, exact: bool) -> str:
    """What to change: the number of nodes of the last group, or the copies of the model."""
    last, have = job.groups[-1], job.world_size
    others = have - last.count * last.processes
    choices: list[str] = []
    if exact and have % unit == 0:
        choices.append(f"set parallel.data_parallel_replicate={have // unit}")
    if exact:
        nodes = [(needed - others) // last.processes] if (needed - others) % last.processes == 0 else []
    else:
        nodes = _fitting_nodes(last.count, last.processes, others, needed)
    nodes = [count for count in nodes if count > 0]
    if nodes:
        choices.append(f"give group {last.name} {' or '.join(map(str, nodes))} nodes")
    choices.append("choose other degrees (`anychip plan` finds them)")
    text = ", or ".join(choices)
    return f"{text[0].upper()}{text[1:]}."


def _fitting_nodes(count: int, processes: int, others: int, unit: int) -> list[int]:
    """The numbers of nodes next to `count` whose processes, with the others, are a multiple of `unit`."""
    if others % gcd(processes, unit):
        return []
    period = lcm(processes, unit) // processes
    below = next((n for n in range(count, max(0, count - period), -1) if (n * processes + others) % unit == 0), 0)
    above = next(n for n in range(count + 1, count + 1 + period) if (n * processes + others) % unit == 0)
    return [below, above]


def _check_launcher(job: Job) -> None:
    launch = job.launch
    if job.least_hosts > job.nodes or (job.least_hosts and launch.kind in IN_CONTAINERS):
        raise InputError(
            f"{launch.kind} with {job.nodes} nodes cannot recover by itself with {job.least_hosts} hosts.",
            where="--supervise",
            do="Give at most the number of nodes, and torchrun or slurm as launch.kind.",
        )
    if len(job.groups) > 1 and launch.kind in ONE_GROUP:
        raise InputError(
            f"{launch.kind} starts nodes of one kind; the cluster has {len(job.groups)} groups.",
            where="launch.kind",
            do="Choose torchrun or volcano, or launch on one group.",
        )
    if launch.kind == "torchrun":
        if len(launch.hosts) != job.nodes:
            raise InputError(
                f"{len(launch.hosts)} hosts are named for {job.nodes} nodes.",
                where="launch.hosts",
                do="Name one host a node, in the order of the groups.",
            )
        if len(set(launch.hosts)) != len(launch.hosts):
            raise InputError("a host is named twice.", where="launch.hosts", do="Name each host once.")
        return
    if launch.kind not in IN_CONTAINERS:
        return
    if launch.image is None:
        raise InputError(
            f"{launch.kind} needs a container image.", where="launch.image", do="Name an image with anychip in it."
        )
    if launch.volume_claim is None:
        raise InputError(
            f"{launch.kind} needs a volume that all Pods share: data and checkpoints live there.",
            where="launch.volume_claim",
            do="Name a PersistentVolumeClaim with access mode ReadWriteMany.",
        )
    chip = job.groups[0].chip
    name = job.facts.scheduling.device(chip.id)
    if chip.vendor != "cpu" and name is None:
        raise InputError(
            f"what Kubernetes calls {chip.name} is not known to us.",
            where="groups",
            do="Use torchrun or slurm, or add the name to the backend's Scheduling (docs/en/chips.md).",
        )
    if launch.kind == "ascendjob" and not (name and name.operator_label):
        raise InputError(
            f"an AscendJob is for chips that its operator knows; {chip.name} is none of them.",
            where="launch.kind",
            do="Choose volcano or kubernetes.",
        )
