"""Counts of devices that no layout divides: the whole nodes that are best used, and what would use all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from anychip.errors import InputError
from anychip.plan.search import possible
from anychip.plan.types import Machine, Rejected, SearchResult, Site, Workload

LARGEST_TRIED = 3  # counts that divide
_NEAR = 1 / 8  # of the global batch, that another one may be away


def search_usable(
    workload: Workload, machine: Machine, site: Site, searched: Callable[[Machine], SearchResult]
) -> tuple[SearchResult, Machine, str]:
    """The best layouts on all devices or, where no layout divides those, on as many whole nodes as are fastest.

    `searched` is the search on a machine. Also returns the machine that is left, and a sentence on devices that stay
    idle, empty when none does. Raises InputError when no count of nodes works, naming what fails.
    """
    try:
        return searched(machine), machine, ""
    except InputError:
        refused, some = possible(workload, machine, site)
        if some:
            raise
    found = [(searched(part), part) for part in _parts(workload, machine, site)]
    if not found:
        raise InputError(
            f"no layout divides the {machine.devices:,} devices of {machine.name}, nor those of fewer whole nodes: "
            f"{obstacle(workload, refused)}.",
            do=advice(workload, machine, site, refused),
        )
    result, part = max(found, key=lambda pair: _tokens_per_second(pair[0]))  # the largest where none fits
    idle = idle_sentence(workload, machine, part, refused)
    larger = [other.devices for rival, other in found if rival.best and other.devices > part.devices]
    return result, part, idle + (f" ({larger[0]:,} would divide, and be slower)" if larger else "")


def _parts(workload: Workload, machine: Machine, site: Site) -> list[Machine]:
    """The largest counts of whole nodes that some layout divides, and the largest of which each device may be a copy:
    odd counts leave poor layouts only."""
    found: list[Machine] = []
    for nodes in range((machine.devices - 1) // machine.devices_per_node, 0, -1):
        devices = nodes * machine.devices_per_node
        even = workload.global_batch % devices == 0
        if len(found) < LARGEST_TRIED or even:
            part = of_nodes(machine, nodes)
            if possible(workload, part, site)[1]:
                found.append(part)
                if even:
                    break
    return found


def _tokens_per_second(result: SearchResult) -> float:
    best = result.best[0] if result.best else None
    return best.tokens_per_second_per_device * best.layout.devices if best else 0.0


def of_nodes(machine: Machine, nodes: int) -> Machine:
    """The machine with fewer of its nodes."""
    devices = min(nodes * machine.devices_per_node, machine.devices)
    tiers = [replace(tier, devices=min(tier.devices, devices)) for tier in machine.tiers]
    enough = next((level for level, tier in enumerate(tiers) if tier.devices >= devices), len(tiers) - 1)
    return replace(machine, devices=devices, tiers=tuple(tiers[: enough + 1]))


def idle_sentence(workload: Workload, machine: Machine, part: Machine, refused: Sequence[Rejected]) -> str:
    """How many devices are used and idle, why, and which batch would use all."""
    said = (
        f"{part.devices:,} of {machine.devices:,} devices are used; {machine.devices - part.devices:,} idle, because "
        f"{obstacle(workload, refused)}"
    )
    batch = near_batch(workload, refused)
    return f"{said}; a global batch of {batch:,} would use all" if batch else said


def obstacle(workload: Workload, refused: Sequence[Rejected]) -> str:
    """What the layouts that come nearest fail by: the batch, if there are degrees that divide the devices."""
    if copies := _copies(workload, refused):
        shown = ", ".join(map(str, copies[:6])) + (" ..." if len(copies) > 6 else "")
        return f"the global batch of {workload.global_batch:,} divides by none of the dp that are left ({shown})"
    reasons: dict[str, int] = {}
    for rejected in refused:
        reasons[rejected.reason] = reasons.get(rejected.reason, 0) + 1
    shown = "; ".join(sorted(reasons, key=lambda reason: -reasons[reason])[:3])
    return shown or f"TP and PP divide neither {workload.heads} heads nor {workload.layers} layers"


def _copies(workload: Workload, refused: Sequence[Rejected]) -> list[int]:
    """Degrees of data parallelism that were left and do not divide the batch."""
    return sorted({each.layout.dp for each in refused if each.layout.dp > 1 and workload.global_batch % each.layout.dp})


def near_batch(workload: Workload, refused: Sequence[Rejected]) -> int:
    """The global batch nearest to the workload's that the largest possible dp divides; 0 when none is near."""
    for copies in reversed(_copies(workload, refused)):
        batch = max(1, round(workload.global_batch / copies)) * copies
        if abs(batch - workload.global_batch) <= _NEAR * workload.global_batch:
            return batch
    return 0


def advice(workload: Workload, machine: Machine, site: Site, refused: Sequence[Rejected]) -> str:
    """Counts of devices and a batch near those asked for that would do."""
    nodes = math.ceil(machine.devices / machine.devices_per_node)
    more = next((count for count in range(nodes + 1, 2 * nodes + 9) if _grown(workload, machine, site, count)), 0)
    found = [f"{more * machine.devices_per_node:,} devices"] if more else []
    if batch := near_batch(workload, refused):
        found.append(f"a global batch of {batch:,}")
    if not found:
        return "Change the global batch size or the number of devices."
    return f"Take {' or '.join(found)}, which would do."


def _grown(workload: Workload, machine: Machine, site: Site, nodes: int) -> bool:
    """Whether some layout divides so many nodes; their network is that of the last tier."""
    devices = nodes * machine.devices_per_node
    tiers = (*machine.tiers[:-1], replace(machine.tiers[-1], devices=devices))
    return possible(workload, replace(machine, devices=devices, tiers=tiers), site)[1]
