"""Collectives follow the ring's equation, and groups share the way out of a node by where they lie."""

from __future__ import annotations

import numpy as np
import pytest

from anychip.plan.network import all_gather, all_reduce, all_to_all, group_of, point_to_point
from anychip.plan.table import Hardware, hardware_of
from anychip.plan.types import Floats, LinkTier, Machine, Site

SITE = Site(name="ideal", intra_node_efficiency=1.0, inter_node_efficiency=1.0)


def hardware(*tiers: LinkTier) -> Hardware:
    machine = Machine("m", "c", tiers[-1].devices, 8, {"bf16": 1e14}, 6.4e10, 1e12, tiers)
    return hardware_of([machine], ["bf16"])


TWO_LEVELS = hardware(LinkTier("node", 8, 200e9, 0.0), LinkTier("cluster", 64, 25e9, 0.0))


def n(value: float) -> Floats:
    return np.array([float(value)])


def test_a_ring_inside_a_node() -> None:
    group = group_of(n(8), n(1), TWO_LEVELS, SITE)
    assert all_reduce(group, n(1e9))[0] == pytest.approx(2 * 7 / 8 * 1e9 / 200e9)
    assert all_gather(group, n(1e9))[0] == pytest.approx(7 / 8 * 1e9 / 200e9)


@pytest.mark.parametrize(("size", "links"), [(2, 1), (4, 3), (8, 7)])
def test_a_mesh_gives_a_group_the_links_between_its_members(size: int, links: int) -> None:
    """Eight devices, seven links each: two of them have one link, four have three."""
    mesh = hardware(LinkTier("node", 8, 196e9, 0.0, peers=7), LinkTier("cluster", 64, 25e9, 0.0))
    group = group_of(n(size), n(1), mesh, SITE)
    assert group.bytes_per_s[0] == pytest.approx(links * 28e9)
    assert all_to_all(group, n(1e9), n(1), mesh, SITE)[0] == pytest.approx((size - 1) / size * 1e9 / (links * 28e9))
    assert point_to_point(n(4), n(1e9), mesh, SITE)[0] == pytest.approx(1e9 / 28e9)
    assert group_of(n(8), n(8), mesh, SITE).bytes_per_s[0] == 25e9  # one member a node: no link inside is used


def test_one_rank_costs_nothing() -> None:
    assert all_reduce(group_of(n(1), n(8), TWO_LEVELS, SITE), n(1e9))[0] == 0.0


@pytest.mark.parametrize(("stride", "members"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_members_of_a_node_share_its_way_out(stride: int, members: int) -> None:
    """Data-parallel ranks a tensor-parallel degree apart: the fewer lie in a node, the less of it they have."""
    group = group_of(n(16), n(stride), TWO_LEVELS, SITE)
    assert group.bytes_per_s[0] == min(200e9, 25e9 * members)


def test_tensor_parallelism_over_two_nodes_is_as_slow_as_their_link() -> None:
    inside, across = (group_of(n(size), n(1), TWO_LEVELS, SITE) for size in (8, 16))
    assert inside.bytes_per_s[0] == 200e9
    assert across.bytes_per_s[0] == 200e9  # eight devices' shares together are as fast as the node's own links
    slow = hardware(LinkTier("node", 8, 200e9, 0.0), LinkTier("cluster", 64, 12.5e9, 0.0))
    assert group_of(n(16), n(1), slow, SITE).bytes_per_s[0] == 100e9


def test_a_supernode_keeps_the_fast_link() -> None:
    levels = hardware(
        LinkTier("node", 8, 200e9, 0.0), LinkTier("supernode", 32, 200e9, 0.0), LinkTier("cluster", 64, 25e9, 0.0)
    )
    assert group_of(n(32), n(1), levels, SITE).bytes_per_s[0] == 200e9
    assert group_of(n(4), n(32), levels, SITE).bytes_per_s[0] == 25e9


def test_copies_for_one_node_travel_together() -> None:
    group = group_of(n(16), n(1), TWO_LEVELS, SITE)
    every, once = (all_to_all(group, n(1e9), n(share), TWO_LEVELS, SITE)[0] for share in (1.0, 0.5))
    assert every == pytest.approx(1e9 * 8 / 16 / 25e9)
    assert once == pytest.approx(every / 2)


def test_point_to_point_takes_the_link_it_crosses() -> None:
    assert point_to_point(n(4), n(1e9), TWO_LEVELS, SITE)[0] == pytest.approx(1e9 / 200e9)
    assert point_to_point(n(8), n(1e9), TWO_LEVELS, SITE)[0] == pytest.approx(1e9 / 25e9)
