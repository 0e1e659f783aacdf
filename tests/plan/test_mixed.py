"""Mixed clusters: stages on unlike chips, layers by what each can do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plan.workloads import DENSE, EXPERTS, SITE, machine

from anychip.errors import InputError
from anychip.plan.mixed import headroom, search_mixed
from anychip.plan.mixed_answer import answer_mixed, mixed_json, options_of
from anychip.plan.mixed_text import mixed_as_text
from anychip.plan.question import ask
from anychip.plan.search import search
from anychip.recipe.cluster import FailureConfig
from anychip.report.mixed_page import render

RECIPE = Path(__file__).parents[2] / "recipes" / "telechat2-3b.yaml"

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


def test_a_gain_that_rounds_to_nothing_is_not_called_one() -> None:
    result = search_mixed(DENSE, [FAST, SLOW], [SITE, SITE], 25e9)
    assert "hardly faster than fast alone" in replace(result, gain=1.004).verdict


def test_like_parts_share_evenly() -> None:
    result = search_mixed(DENSE, [FAST, replace(FAST, name="twin")], [SITE, SITE], 25e9)
    assert result.best[0].devices_used == {"fast": 16, "twin": 16}


def test_memory_bounds_a_stage() -> None:
    small = replace(SLOW, memory_bytes=24e9)
    result = search_mixed(DENSE, [FAST, small], [SITE, SITE], 25e9)
    for plan in result.best:
        for name, held in zip(plan.groups, plan.memory_bytes, strict=True):
            assert held <= (24e9 if name == "slow" else FAST.memory_bytes)


def test_the_step_and_its_memory_are_told_by_terms() -> None:
    plan = search_mixed(DENSE, [FAST, SLOW], [SITE, SITE], 25e9).best[0]
    assert sum(plan.time.values()) == pytest.approx(plan.step_seconds)
    assert all(seconds >= 0 for seconds in plan.time.values())
    slowest, m = plan.stage_seconds.max(), plan.layout.micro_batches(DENSE)
    busy = ("matmul", "attention", "pointwise", "overhead", "recompute", "tensor_parallel", "ends")
    assert sum(plan.time[name] for name in busy) == pytest.approx(m * slowest, rel=1e-6)
    assert all(values.shape == (plan.layout.pp,) for values in plan.memory.values())
    assert np.allclose(plan.memory_bytes, sum(plan.memory.values()))


def test_a_part_is_compared_at_the_devices_that_serve_it_best() -> None:
    """Of 24 devices 16 divide a batch of 256: the other part is not alone in being counted."""
    odd = replace(machine(24), name="odd")
    result = search_mixed(DENSE, [odd, replace(SLOW, peak_flops={"bf16": 5e13})], [SITE, SITE], 25e9)
    alone, direct = result.alone["odd"], search(DENSE, machine(16), SITE).best[0]
    assert alone.prediction is not None and alone.prediction.step_seconds == pytest.approx(direct.step_seconds)
    assert alone.said.startswith("16 of 24 devices are used; 8 idle")
    assert "odd alone on 16 of its 24 devices" in result.verdict
    best = result.best[0].tokens_per_second
    assert result.gain == pytest.approx(best / (direct.tokens_per_second_per_device * 16))


def test_a_part_that_cannot_run_it_says_why() -> None:
    small = replace(SLOW, memory_bytes=8e9)
    result = search_mixed(DENSE, [FAST, small], [SITE, SITE], 25e9)
    assert result.alone["slow"].prediction is None and "GiB over" in result.alone["slow"].said


def test_what_is_rejected_keeps_its_reason_and_the_nearest_comes_first() -> None:
    tight = [replace(part, memory_bytes=5e9) for part in (FAST, SLOW)]
    result = search_mixed(DENSE, tight, [SITE, SITE], 25e9)
    assert not result.best and result.gain == 0
    assert result.verdict.startswith("No layout over all parts fits; nearest is ")
    assert result.rejected[0].reason in result.verdict and result.rejected[0].reason
    reasons = {
        each.reason for each in search_mixed(replace(DENSE, global_batch=6), [FAST, SLOW], [SITE, SITE], 25e9).rejected
    }
    assert "global batch 6 does not divide by dp 4" in reasons
    deep = search_mixed(replace(DENSE, layers=16), [FAST, SLOW], [SITE, SITE], 25e9)
    assert "16 layers are fewer than its 32 stages" in {each.reason for each in deep.rejected}


def test_every_stage_of_every_plan_fits() -> None:
    tight = [replace(FAST, memory_bytes=20e9), replace(SLOW, memory_bytes=18e9)]
    here = replace(SITE, trained_here=True)
    found = search_mixed(DENSE, tight, [here, here], 25e9).best
    assert found
    for plan in found:
        room = [20e9 if name == "fast" else 18e9 for name in plan.groups]
        assert (plan.memory_bytes <= room).all() and min(plan.layout.stage_layers) >= 1
        assert {term for term, values in plan.memory.items() if values.max() > 0} >= {"weights", "optimizer"}


def test_experts_are_shared_out_within_the_stages() -> None:
    here = replace(SITE, trained_here=True)
    best = search_mixed(EXPERTS, [FAST, SLOW], [here, here], 25e9).best
    assert {plan.layout.tp for plan in best} == {1} and max(plan.layout.ep for plan in best) > 1
    assert all(plan.layout.dp % plan.layout.ep == 0 for plan in best)


def test_failures_count_for_the_mixture_and_for_each_part() -> None:
    often = FailureConfig(per_1000_node_days=1000, restart_seconds=900, checkpoint_stall_seconds=30)
    calm = search_mixed(DENSE, [FAST, SLOW], [SITE, SITE], 25e9)
    rough = search_mixed(DENSE, [FAST, SLOW], [SITE, SITE], 25e9, often)
    assert calm.best[0].useful == 1 and rough.best[0].useful < rough.alone["fast"].useful < 1
    assert rough.gain < calm.gain  # four nodes fail oftener than two


def cluster(tmp_path: Path, *groups: str) -> Path:
    path = tmp_path / "cluster.yaml"
    listed = "".join(f"  - {{{group}, nodes: 2, devices_per_node: 8}}\n" for group in groups)
    failures = (
        "failures: {per_1000_node_days: 10, restart_seconds: 600, checkpoint_stall_seconds: 60, spare_nodes: 1}\n"
    )
    path.write_text(f"schema_version: 1\nname: both\ngroups:\n{listed}{failures}")
    return path


def test_the_answer_has_days_after_failures_notes_and_options_of_training(tmp_path: Path) -> None:
    groups = ("name: a, chip: ascend-910b3", "name: b, chip: ascend-910c-die")
    question = ask(RECIPE, cluster=cluster(tmp_path, *groups), tokens=1e10)
    answer = answer_mixed(question, question.models[0])
    assert answer.goodput is not None and answer.goodput.effective < 1
    assert np.isfinite(answer.goodput.storage_interval_s)
    values = json.loads(json.dumps(mixed_json(answer)))
    assert values["goodput"]["days_interval"][0] < values["goodput"]["days"] < values["goodput"]["days_interval"][1]
    assert all(each["layout"] and each["reason"] for each in values["rejected"])
    assert "assumed: a spare node stands in for a node of any kind" in values["notes"]
    text = mixed_as_text(answer)
    for said in ("a save to storage every", "memory, GiB", "matmul", "to train with it: --set", "a alone: "):
        assert said in text
    page = render(answer)
    assert page.count("<svg") == 3  # time, and the memory of each kind
    for said in (
        answer.result.verdict,
        "a alone: ",
        "assumed: a spare node",
        "to train with it: --set",
        "of the time is useful",
    ):
        assert said in page
    assert all(f"stage {stage}" in page for stage in range(answer.result.best[0].layout.pp))
    made_again = replace(answer.result.best[0], time={**answer.result.best[0].time, "recompute": 1.0})
    both = replace(answer, result=replace(answer.result, best=[answer.result.best[0], made_again]))
    assert "</i>recompute" in render(both)  # a bar of another pipeline has terms that the best one lacks
    nothing = replace(answer, result=replace(answer.result, best=[], gain=0.0), goodput=None)
    assert "No layout over all parts fits" in render(nothing) and "<svg" not in render(nothing)
    assert any(option.startswith("parallel.pipeline_layers=[") for option in values["best"][0]["overrides"])


def test_makes_that_our_training_does_not_join_get_no_options(tmp_path: Path) -> None:
    groups = ("name: a, chip: ascend-910b3", "name: b, chip: mlu590")
    question = ask(RECIPE, cluster=cluster(tmp_path, *groups), tokens=1e10)
    answer = answer_mixed(question, question.models[0])
    assert "one process each only" in mixed_as_text(answer) and mixed_json(answer)["best"][0]["overrides"] is None
    assert any(note.startswith("assumed: 25 GB/s") and note.endswith("(b)") for note in answer.notes)
    plan = answer.result.best[0]
    one_each = replace(plan, layout=replace(plan.layout, dp=1, tp=1, pp=2, stage_layers=(10, 18)))
    options = options_of(one_each, question.machines)
    assert options is not None and "parallel.host_transfers=true" in options


def test_one_kind_is_no_mixture() -> None:
    with pytest.raises(InputError, match="two kinds"):
        search_mixed(DENSE, [FAST], [SITE], 25e9)
