"""The busiest rank of experts is the one that all others wait for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan.workloads import EXPERTS, SITE, machine

from anychip.errors import InputError
from anychip.plan.predict import predict
from anychip.plan.question import ask, with_imbalance
from anychip.plan.types import Layout

RECIPES = Path(__file__).parents[2] / "recipes"


def test_twice_the_mean_load_takes_twice_the_traffic_and_nearly_twice_the_experts_products() -> None:
    layout = Layout(dp=64, ep=16, zero=3)
    even, twice, thrice = (
        predict(EXPERTS, layout, machine(), replace(SITE, expert_imbalance=factor)).time for factor in (1.0, 2.0, 3.0)
    )
    latency = 2 * even["expert_parallel"] - twice["expert_parallel"]  # what does not grow with bytes
    assert 0 < latency < 0.2 * even["expert_parallel"]
    more = twice["matmul"] - even["matmul"]
    flops = 3 * 2 * 31 * 4096 * 256 / 64 * 2 * 3 * 4096 * 2816
    assert more > flops / (313e12 * SITE.matmul_efficiency)
    assert thrice["matmul"] - twice["matmul"] == pytest.approx(more, rel=0.1)
    for term in ("attention", "ends", "pointwise", "data_parallel"):
        assert even[term] == twice[term]


def test_one_rank_with_all_experts_has_the_mean_load() -> None:
    alone = Layout(dp=64, zero=3)
    even, twice = (predict(EXPERTS, alone, machine(), replace(SITE, expert_imbalance=f)) for f in (1.0, 2.0))
    assert even.step_seconds == twice.step_seconds


def test_the_flag_reaches_every_site_and_is_checked() -> None:
    recipe, chips = RECIPES / "moe-1t.yaml", {"chip": "h100-sxm", "devices": 512}
    assert [site.expert_imbalance for site in ask(recipe, **chips).sites] == [1.0]  # type: ignore[arg-type]
    asked = with_imbalance(ask(recipe, **chips), 1.3)  # type: ignore[arg-type]
    assert [site.expert_imbalance for site in asked.sites] == [1.3]
    for wrong in (0.5, 1e6, float("nan")):
        with pytest.raises(InputError, match="busiest rank's load over the mean"):
            with_imbalance(asked, wrong)
    with pytest.raises(InputError, match="models with experts"):
        with_imbalance(ask(RECIPES / "telechat2-7b.yaml", **chips), 1.3)  # type: ignore[arg-type]
