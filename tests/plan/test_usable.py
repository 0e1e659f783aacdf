"""Counts of devices that no layout divides: a plan on some of the nodes, and what fails said by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan.workloads import DENSE, SITE, machine

from anychip.errors import InputError
from anychip.plan.answer import answer_plan, as_json
from anychip.plan.search import search
from anychip.plan.text import answer_as_text
from anychip.plan.usable import of_nodes


def test_a_count_that_nothing_divides_is_planned_on_some_of_its_nodes() -> None:
    """A batch of 256 does not divide by three, and 32 layers neither: 24 devices leave 16 in use."""
    answer = answer_plan(DENSE, machine(24), SITE, 1e9)
    assert answer.chosen.layout.devices == answer.machine.devices == 16
    assert answer.idle_devices == as_json(answer)["machine"]["idle_devices"] == 8
    said = "16 of 24 devices are used; 8 idle, because the global batch of 256 divides by none of the dp"
    assert answer.notes[0].startswith(said) and "a global batch of 264 would use all" in answer.notes[0]
    assert answer_as_text(answer).count(said) == 1
    direct = search(DENSE, machine(16), SITE).best[0]
    assert answer.chosen.step_seconds == pytest.approx(direct.step_seconds)
    assert answer_plan(replace(DENSE, global_batch=264), machine(24), SITE, 1e9).idle_devices == 0


def test_an_even_count_is_preferred_where_a_larger_one_leaves_poor_layouts_only() -> None:
    """30 layers divide by 15, so 240 devices divide; 128 copies of a small model are faster than 15 stages."""
    work = replace(DENSE, layers=30, hidden=1024, ffn=2816, heads=8)
    answer = answer_plan(work, machine(248), SITE, 1e9)
    slower = search(work, machine(240), SITE).best[0]
    best = answer.chosen
    assert answer.machine.devices == 128
    assert best.tokens_per_second_per_device * 128 > slower.tokens_per_second_per_device * 240
    assert "(240 would divide, and be slower)" in answer.notes[0]


def test_what_fails_is_named_where_no_count_works() -> None:
    odd = replace(DENSE, global_batch=31, layers=29)
    with pytest.raises(InputError) as refused:
        answer_plan(odd, replace(machine(24), devices_per_node=24), SITE, 1e9)
    assert "the global batch of 31 divides by none of the dp that are left (3, 6, 12, 24)" in str(refused.value)
    assert "a global batch of 30" in str(refused.value) and "heads" not in str(refused.value)


def test_fewer_nodes_have_the_network_of_their_own() -> None:
    whole = machine(64)
    part, one = of_nodes(whole, 2), of_nodes(whole, 1)
    assert [tier.devices for tier in part.tiers] == [8, 16] and part.nodes == 2
    assert [tier.devices for tier in one.tiers] == [8]
