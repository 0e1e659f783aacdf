"""Machines of the planner: a cluster file and the chip catalogue put together, gaps filled by stated assumptions."""

from __future__ import annotations

from anychip.chips.catalog import Chip, find_chip
from anychip.errors import InputError
from anychip.plan.types import LinkTier, Machine
from anychip.recipe.cluster import Cluster, NodeGroup

INTRA_NODE_LATENCY_S = 5e-6  # of one hop of a collective, launch included
INTER_NODE_LATENCY_S = 15e-6
# Taken where the catalogue knows nothing, and said so in the plan.
ASSUMED_INTRA_NODE_GB_PER_S = 25.0
ASSUMED_INTER_NODE_GBIT_PER_S = 100.0
ASSUMED_DEVICES_PER_NODE = 8


def machines_of(cluster: Cluster) -> tuple[Machine, ...]:
    """One machine for each node group of a cluster. Raises InputError for unknown chips or missing figures."""
    return tuple(machine_of_group(group) for group in cluster.groups)


def machine_of_group(group: NodeGroup) -> Machine:
    """Devices of one node group; what the group states comes before what the catalogue says of its chip."""
    per_node = group.devices_per_node or find_chip(group.chip).devices_per_node or ASSUMED_DEVICES_PER_NODE
    supernode = group.supernode_nodes * per_node if group.supernode_nodes else None
    return machine_of_chip(
        group.chip,
        group.nodes * per_node,
        devices_per_node=per_node,
        intra_node_gb_per_s=group.intra_node_gb_per_s,
        inter_node_gbit_per_s=group.inter_node_gbit_per_s,
        supernode_devices=supernode,
        watts_per_device=group.watts_per_node / per_node if group.watts_per_node else None,
        name=group.name,
    )


def machine_of_chip(
    chip_id: str,
    devices: int,
    *,
    devices_per_node: int | None = None,
    intra_node_gb_per_s: float | None = None,
    inter_node_gbit_per_s: float | None = None,
    supernode_devices: int | None = None,
    watts_per_device: float | None = None,
    name: str = "",
) -> Machine:
    """`devices` of one chip; arguments left out come from the catalogue, or are assumed and listed in `assumed`."""
    chip = find_chip(chip_id)
    assumed: list[str] = []
    per_node = devices_per_node or chip.devices_per_node
    if per_node is None:
        per_node = ASSUMED_DEVICES_PER_NODE
        assumed.append(f"{per_node} devices a node")
    if intra_node_gb_per_s is None:
        intra_node_gb_per_s = chip.intra_node_gb_per_s.value if chip.intra_node_gb_per_s else None
    if intra_node_gb_per_s is None:
        intra_node_gb_per_s = ASSUMED_INTRA_NODE_GB_PER_S
        if per_node > 1:
            assumed.append(f"{intra_node_gb_per_s:g} GB/s a device inside a node")
    if inter_node_gbit_per_s is None:
        inter_node_gbit_per_s = chip.inter_node_gbit_per_s.value if chip.inter_node_gbit_per_s else None
    if inter_node_gbit_per_s is None:
        inter_node_gbit_per_s = ASSUMED_INTER_NODE_GBIT_PER_S
        if devices > per_node:
            assumed.append(f"{inter_node_gbit_per_s:g} Gbit/s a device between nodes")
    supernode = supernode_devices or chip.supernode_devices
    if watts_per_device is None and chip.tdp_watts:
        watts_per_device = chip.tdp_watts.value
    return Machine(
        name=name or f"{devices} x {chip.name}",
        chip=chip.id,
        devices=devices,
        devices_per_node=per_node,
        peak_flops=_peaks(chip),
        memory_bytes=_needed(chip, "memory_gb") * 1e9,
        memory_bytes_per_s=chip.memory_gb_per_s.value * 1e9 if chip.memory_gb_per_s else 0.0,
        tiers=_tiers(
            devices,
            per_node,
            supernode,
            intra_node_gb_per_s * 1e9,
            inter_node_gbit_per_s * 1e9 / 8,
            peers=per_node - 1 if chip.intra_node_mesh else 0,
        ),
        watts_per_device=watts_per_device,
        torch_device_type=chip.torch_device_type,
        assumed=tuple(assumed),
    )


def _tiers(
    devices: int, per_node: int, supernode: int | None, inside: float, outside: float, peers: int
) -> tuple[LinkTier, ...]:
    """A super-node's switches carry what a node's links do; only its latency is a network's."""
    tiers = [LinkTier("node", min(per_node, devices), inside, INTRA_NODE_LATENCY_S, peers)]
    if supernode and supernode > per_node and devices > per_node:
        tiers.append(LinkTier("supernode", min(supernode, devices), inside, INTER_NODE_LATENCY_S))
    if devices > tiers[-1].devices:
        tiers.append(LinkTier("cluster", devices, outside, INTER_NODE_LATENCY_S))
    return tuple(tiers)


def _peaks(chip: Chip) -> dict[str, float]:
    """Dense FLOP/s by type; empty where nobody has published any, which a site that measured the chip can fill in."""
    peaks: dict[str, float] = {dtype: figure.value * 1e12 for dtype, figure in chip.peak_tflops.items()}
    if "fp8" not in peaks and "int8" in peaks and chip.vendor in ("nvidia", "amd") and (chip.year or 0) >= 2022:
        peaks["fp8"] = peaks["int8"]
    return peaks


def _needed(chip: Chip, name: str) -> float:
    figure = getattr(chip, name)
    if figure is None:
        measure = "Measure this machine with `anychip bench chip --out chip.json`, then give plan --bench chip.json"
        other = "." if chip.vendor == "cpu" else ", or plan with a chip whose figures are known."
        raise InputError(
            f"the catalogue does not know {name} of {chip.id}.",
            do=f"{measure} in place of --cluster or --chip{other}",
        )
    return float(figure.value)
