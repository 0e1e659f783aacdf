"""Time of collectives on a network of tiers (devices of a node, of a super-node, of the cluster).

Ranks are laid out with tensor parallelism innermost, then context, data, pipeline. A group of `size` ranks that lie
`stride` apart fills `members = block // stride` places of each block; those members share the block's way out, so a
ring over the group moves `members` times a device's share of it. Costs follow the usual alpha-beta model
(Thakur et al. 2005, NCCL's rings and trees).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anychip.plan.table import MAX_TIERS, Hardware
from anychip.plan.types import Floats, Site


@dataclass(frozen=True)
class Group:
    """A process group seen by the network: its size, the speed of a ring through it, its latency a hop."""

    size: Floats
    bytes_per_s: Floats
    latency: Floats
    members: Floats  # in one node


def group_of(size: Floats, stride: Floats, hardware: Hardware, site: Site) -> Group:
    """Place a group whose neighbours are `stride` ranks apart."""
    efficiency = (site.intra_node_efficiency, site.inter_node_efficiency, site.inter_node_efficiency)
    in_node = np.clip(np.floor(hardware.tier_size[0] / stride), 1, size)
    bandwidth = node_bandwidth(in_node, hardware, site)
    latency = np.broadcast_to(hardware.tier_latency[0], np.broadcast_shapes(np.shape(size), np.shape(bandwidth)))
    members = in_node
    for level in range(1, MAX_TIERS):
        leaves = size > members
        out = hardware.tier_bandwidth[level] * efficiency[level] * members
        bandwidth = np.where(leaves, np.minimum(bandwidth, out), bandwidth)
        latency = np.where(leaves, hardware.tier_latency[level], latency)
        members = np.clip(np.floor(hardware.tier_size[level] / stride), 1, size)
    return Group(size=size, bytes_per_s=bandwidth, latency=latency, members=in_node)


def node_bandwidth(members: Floats, hardware: Hardware, site: Site) -> Floats:
    """Bytes/s that each of `members` devices of a node sends to the others.

    Behind a switch that is all of its bandwidth. In a full mesh only the links to the other members carry anything.
    """
    some = (hardware.peers > 0) & (members > 1)
    share = np.where(some, np.minimum(1.0, (members - 1) / np.maximum(hardware.peers, 1)), 1.0)
    return np.asarray(hardware.tier_bandwidth[0] * site.intra_node_efficiency * share)


def all_reduce(group: Group, size_bytes: Floats) -> Floats:
    """Seconds to sum `size_bytes` on every rank."""
    return 2 * all_gather(group, size_bytes)


def all_gather(group: Group, size_bytes: Floats) -> Floats:
    """Seconds until every rank holds all `size_bytes`, of which it had 1/size. Reduce-scatter takes the same."""
    n = group.size
    hops = np.ceil(np.log2(np.maximum(n, 1)))
    return np.where(n > 1, hops * group.latency + (n - 1) / n * size_bytes / group.bytes_per_s, 0.0)


def all_to_all(group: Group, size_bytes: Floats, outer_share: Floats, hardware: Hardware, site: Site) -> Floats:
    """Seconds to exchange `size_bytes` of each rank evenly; the inner and the outer part overlap.

    `outer_share` is what remains of the outer part when copies for one node travel together.
    """
    n, inside = group.size, group.members
    inner = size_bytes * (inside - 1) / n / node_bandwidth(inside, hardware, site)
    outer = outer_share * size_bytes * (n - inside) / n / (hardware.tier_bandwidth[1] * site.inter_node_efficiency)
    return np.where(n > 1, group.latency * np.sqrt(n) + np.maximum(inner, outer), 0.0)


def point_to_point(stride: Floats, size_bytes: Floats, hardware: Hardware, site: Site) -> Floats:
    """Seconds to send `size_bytes` to the rank `stride` further on."""
    crosses = stride >= hardware.tier_size[0]
    far = stride >= hardware.tier_size[1]
    outer = np.where(far, hardware.tier_bandwidth[2], hardware.tier_bandwidth[1]) * site.inter_node_efficiency
    bandwidth = np.where(crosses, outer, node_bandwidth(np.full_like(stride, 2.0), hardware, site))
    latency = np.where(crosses, hardware.tier_latency[1], hardware.tier_latency[0])
    return latency + size_bytes / bandwidth
