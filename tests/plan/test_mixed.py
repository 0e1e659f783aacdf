"""Mixed clusters: stages on unlike chips, layers by what each can do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan.workloads import DENSE, SITE, machine

from anychip.errors import InputError
from anychip.plan.mixed import headroom, search_mixed

FAST = replace(machine(16), name="fast")
SLOW = replace(machine(16, "ascend-910b4"), name="slow", memory_bytes=64e9)


def test_the_faster_chips_get_more_layers_and_both_beat_one() -> None:
    slower = replace(SLOW, peak_flops={"bf16": FAST.peak_flops["bf16"] / 2})
    result = search_mixed(DENSE, [FAST, slower], [SITE, SITE], 25e9)
    plan = result.best[0]
    layers = dict.fromkeys(("fast", "slow"), 0)
    for name, count in zip(plan.groups, plan.layout.stage_layers, strict=True):
        layers[name] += count
    assert layers["fast"] > layers["slow"] > 0
    assert sum(layers.values()) == DENSE.layers
    assert 1.0 < result.gain < 2.0
    assert "times as fast as fast alone" in result.verdict
    assert all(free >= 0 for free in headroom(plan, [FAST, slower]).values())


def test_chips_too_slow_to_help_are_left_out_by_the_verdict() -> None:
    crawling = replace(SLOW, peak_flops={"bf16": 1e12}, memory_bytes_per_s=1e10)
    result = search_mixed(DENSE, [FAST, crawling], [SITE, SITE], 25e9)
    assert result.gain < 1.0
    assert result.verdict.startswith("Do not mix")


def test_like_parts_share_evenly() -> None:
    result = search_mixed(DENSE, [FAST, replace(FAST, name="twin")], [SITE, SITE], 25e9)
    assert result.best[0].devices_used == {"fast": 16, "twin": 16}


def test_memory_bounds_a_stage() -> None:
    small = replace(SLOW, memory_bytes=24e9)
    result = search_mixed(DENSE, [FAST, small], [SITE, SITE], 25e9)
    for plan in result.best:
        for name, held in zip(plan.groups, plan.memory_bytes, strict=True):
            assert held <= (24e9 if name == "slow" else FAST.memory_bytes)


def test_one_kind_is_no_mixture() -> None:
    with pytest.raises(InputError, match="two kinds"):
        search_mixed(DENSE, [FAST], [SITE], 25e9)
