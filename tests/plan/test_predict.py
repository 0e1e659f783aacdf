"""One layout in full and many at once: terms add up, and more of anything costs what it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plan.workloads import DENSE, EXPERTS, LAYOUT, SITE, machine

from anychip.errors import InputError
from anychip.plan.memory import TERMS
from anychip.plan.predict import predict, predict_many, refusals
from anychip.plan.types import SCHEDULES, Layout, Schedule


def step(layout: Layout, **changes: object) -> float:
    return predict(replace(DENSE, **changes), layout, machine(layout.devices), SITE).step_seconds  # type: ignore[arg-type]


def test_terms_add_up_and_rates_agree() -> None:
    prediction = predict(DENSE, LAYOUT, machine(), SITE)
    assert sum(prediction.time.values()) == pytest.approx(prediction.step_seconds)
    assert prediction.tokens_per_second_per_device == pytest.approx(DENSE.tokens / prediction.step_seconds / 64)
    assert 0 < prediction.mfu < 1
    assert prediction.tflops == pytest.approx(prediction.mfu * 313.0)
    low, high = prediction.interval
    assert low < prediction.step_seconds < high
    assert low * high == pytest.approx(prediction.step_seconds**2)


def test_memory_is_given_for_every_rank_and_term() -> None:
    prediction = predict(DENSE, LAYOUT, machine(), SITE)
    assert set(prediction.memory) == set(TERMS)
    assert all(values.shape == (4,) for values in prediction.memory.values())
    assert prediction.memory_bytes == prediction.memory_by_stage.max()
    assert prediction.stage_seconds.shape == (4,)


def test_many_layouts_equal_each_alone() -> None:
    layouts = [
        LAYOUT,
        replace(LAYOUT, vpp=2, schedule="interleaved"),
        Layout(dp=64, micro_batch=2, zero=3, recompute="full"),
        Layout(dp=8, tp=8, recompute="selective", sequence_parallel=False),
        Layout(dp=2, tp=4, pp=8, vpp=2, schedule="zero_bubble"),
    ]
    many = predict_many(DENSE, layouts, machine(), SITE)
    for index, layout in enumerate(layouts):
        alone = predict(DENSE, layout, machine(), SITE)
        assert many.step_seconds[index] == pytest.approx(alone.step_seconds)
        assert many.memory_bytes[index] == pytest.approx(alone.memory_bytes)
        assert many.layout(index) == layout


def test_what_the_software_does_not_fuse_costs_time() -> None:
    loss, pointwise = replace(SITE, loss_bytes=50.0), replace(SITE, fused_pointwise=False)
    fused, slow_loss, slow_pointwise = (
        predict(DENSE, LAYOUT, machine(), site).time for site in (SITE, loss, pointwise)
    )
    assert slow_loss["ends"] > fused["ends"] and slow_loss["pointwise"] == fused["pointwise"]
    assert slow_pointwise["pointwise"] > 1.3 * fused["pointwise"]


def test_a_micro_batch_pays_for_adding_its_gradients() -> None:
    """Two micro-batches of one sequence read, add and write the gradients twice; one of two sequences does it once."""
    once, twice = (replace(LAYOUT, micro_batch=rows) for rows in (2, 1))
    products = [predict(DENSE, layout, machine(), SITE).time["matmul"] for layout in (once, twice)]
    weights = 32 * (4096 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 11008) / 16
    added = 32 * 6.0 * weights / (1.6e12 * SITE.memory_efficiency)  # by 32 micro-batches more
    assert products[1] - products[0] > added


def test_selective_recomputation_costs_our_training_what_it_makes_again() -> None:
    """Norms and SwiGLU of every layer, read and written once more; behind tensor parallelism norms are kept."""
    here = replace(SITE, trained_here=True)
    alone, split = Layout(dp=8, zero=3), Layout(dp=2, tp=4, sequence_parallel=True)
    tokens, rate = 4096 * 256 / 8, 1.6e12 * SITE.memory_efficiency
    for layout, norms in ((alone, 8 * 4096), (split, 0)):
        none, selective, full = (
            predict(DENSE, replace(layout, recompute=kind), machine(8), here) for kind in ("none", "selective", "full")
        )
        moved = 32 * tokens * (norms + 6 * 11008)  # tp splits SwiGLU as it multiplies the tokens of a process
        assert none.time["recompute"] == 0
        assert selective.time["recompute"] == pytest.approx(moved / rate)
        assert none.step_seconds < selective.step_seconds < full.step_seconds
    others = predict(DENSE, replace(alone, recompute="selective"), machine(8), SITE)
    assert others.time["recompute"] == 0  # fused attention leaves theirs nothing to do


def test_selective_recomputation_makes_rows_of_experts_again() -> None:
    layout, site = Layout(dp=8, zero=3, recompute="selective"), replace(SITE, trained_here=True)
    more = replace(EXPERTS, experts=replace(EXPERTS.experts, top_k=4))
    two, four = (predict(work, layout, machine(8), site).time["recompute"] for work in (EXPERTS, more))
    rows = 31 * 4096 * 256 / 8 * 2 * (6 * 2816 + 4 * 4096)
    assert four - two == pytest.approx(rows / (1.6e12 * SITE.memory_efficiency))


def test_recomputation_trades_time_for_memory() -> None:
    none, full = (predict(DENSE, replace(LAYOUT, recompute=kind), machine(), SITE) for kind in ("none", "full"))
    assert full.step_seconds > none.step_seconds
    assert full.memory["activations"].max() < 0.3 * none.memory["activations"].max()
    half = predict(DENSE, replace(LAYOUT, recompute="full", recompute_layers=4), machine(), SITE)
    assert none.step_seconds < half.step_seconds < full.step_seconds


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_each_zero_degree_shards_one_term_more(zero: int) -> None:
    layout = Layout(dp=64, zero=zero)
    plain = predict(DENSE, replace(layout, zero=0), machine(), SITE).memory
    sharded = predict(DENSE, layout, machine(), SITE).memory
    for degree, term in ((1, "optimizer"), (2, "gradients"), (3, "weights")):
        factor = 64 if zero >= degree else 1
        assert sharded[term][0] == pytest.approx(plain[term][0] / factor)


def test_early_ranks_hold_more_activations_under_1f1b() -> None:
    held = predict(DENSE, LAYOUT, machine(), SITE).memory["activations"]
    assert list(held) == sorted(held, reverse=True)
    assert held[0] == pytest.approx(4 * held[3])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_priced(schedule: Schedule) -> None:
    vpp = 1 if schedule in ("gpipe", "1f1b") else 2
    prediction = predict(DENSE, replace(LAYOUT, schedule=schedule, vpp=vpp), machine(), SITE)
    plain = predict(DENSE, LAYOUT, machine(), SITE)
    assert prediction.time["bubble"] <= plain.time["bubble"] + 1e-9


def test_experts_pay_for_routing_and_share_their_memory() -> None:
    apart = Layout(dp=64, ep=1)
    shared = replace(apart, ep=16)
    one, many = (predict(EXPERTS, layout, machine(), SITE) for layout in (apart, shared))
    assert one.time["expert_parallel"] == 0 < many.time["expert_parallel"]
    assert many.memory["weights"].max() < one.memory["weights"].max() / 3


def test_context_parallelism_divides_activations() -> None:
    long = replace(DENSE, seq_length=32_768, global_batch=32)
    one = predict(long, Layout(dp=16, tp=4), machine(), SITE)
    four = predict(long, Layout(dp=4, tp=4, cp=4), machine(), SITE)
    assert four.memory["activations"].max() == pytest.approx(one.memory["activations"].max() / 4)


def test_an_unusable_layout_says_why() -> None:
    reasons = refusals(DENSE, Layout(dp=3, tp=5, pp=40), machine())
    assert any("devices" in reason for reason in reasons)
    assert any("TP 5" in reason for reason in reasons)
    assert any("32 layers are fewer" in reason for reason in reasons)
    with pytest.raises(InputError, match="global batch"):
        predict(DENSE, Layout(dp=16, tp=4, micro_batch=3), machine(), SITE)
    with pytest.raises(InputError, match="stage layers add up to 31"):
        predict(DENSE, replace(LAYOUT, stage_layers=(8, 8, 8, 7)), machine(), SITE)


def test_too_little_memory_is_named_by_stage() -> None:
    prediction = predict(DENSE, replace(LAYOUT, micro_batch=8), replace(machine(), memory_bytes=16e9), SITE)
    assert not prediction.fits
    assert prediction.reasons[0].startswith("stage 0 is ")
    assert prediction.reasons[0].endswith("GiB over")


def test_uneven_stages_are_priced_by_the_slowest() -> None:
    even = predict(DENSE, LAYOUT, machine(), SITE)
    uneven = predict(DENSE, replace(LAYOUT, stage_layers=(6, 8, 8, 10)), machine(), SITE)
    assert uneven.step_seconds > even.step_seconds
    assert np.argmax(uneven.stage_seconds) == 3


def test_two_more_ways_to_spend_time() -> None:
    assert step(LAYOUT, seq_length=8192) > 1.9 * step(LAYOUT)
    assert step(LAYOUT, global_batch=512) > 1.7 * step(LAYOUT)
