"""Bugs put into training are found by comparing traces: the layer, the direction, and nothing where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted_bugs as bugs
import pytest
from layout_runs import LayoutRun
from traced_runs import Bug, TracedRun, compare_runs

CLEAN = TracedRun(LayoutRun({}, 4), "clean")
L = f"layers.{bugs.LAYER}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


BUGS = [
    (bugs.wrong_loss_scale, "forward", "loss"),
    (bugs.wrong_rope_base, "forward", "layers.0.self_attn.rotated_q"),
    (bugs.stale_keys, "forward", f"{L}.self_attn.attended"),
    (bugs.off_by_one_mask, "forward", f"{L}.self_attn.attended"),
    (bugs.wrong_epsilon, "forward", f"{L}.post_attention_layernorm"),
    (bugs.missing_bias, "backward", f"{L}.self_attn.o_proj.bias"),
    (bugs.wrong_norm_placement, "forward", f"{L}.post_attention_layernorm"),
    (bugs.transposed_heads, "forward", f"{L}.self_attn.attended"),
    (bugs.dropped_micro_batch, "forward", "embed_tokens"),
    (bugs.wrong_initialization, "start", f"{L}.mlp.up_proj.weight"),
    (bugs.detached_gate, "backward", f"{L}.mlp.gate_proj"),
    (bugs.halved_value_gradient, "backward", f"{L}.self_attn.v_proj"),
    (bugs.wrong_gradient_scale_of_embedding, "backward", "embed_tokens"),
    (bugs.wrong_clipping, "update", "applied_grad_norm"),
    (bugs.wrong_weight_decay, "update", "decay"),
    (bugs.wrong_betas, "update", "embed_tokens.weight"),
]
_QUICK = (bugs.wrong_rope_base, bugs.halved_value_gradient, bugs.wrong_weight_decay)


def _case(bug: Bug, direction: str, name: str) -> Any:
    marks = () if bug in _QUICK else (pytest.mark.slow,)
    return pytest.param(bug, direction, name, id=bug.__name__, marks=marks)


# Each bug's run has other micro-batches than the clean one, so that rounding differs as well.
@pytest.mark.parametrize(("bug", "direction", "name"), [_case(*row) for row in BUGS])
def test_a_bug_is_located(bug: Bug, direction: str, name: str, folder: Path) -> None:
    found = compare_runs(CLEAN, TracedRun(LayoutRun({}, 2), bug.__name__, bug), folder)
    assert found.outcome == "bug" and found.departure is not None
    assert (found.departure.direction, found.departure.name) == (direction, name), found.as_text()


def test_gradients_that_are_not_summed_are_located(folder: Path) -> None:
    two = LayoutRun({"data_parallel_replicate": 2}, 4)
    found = compare_runs(CLEAN, TracedRun(two, "unsynced", bugs.missing_gradient_sync), folder)
    assert found.departure is not None
    assert (found.departure.direction, found.departure.name) == ("backward", "lm_head.weight"), found.as_text()


LAYOUTS = [
    LayoutRun({"tensor_parallel": 2}, 8),
    LayoutRun({"data_parallel_shard": 2}, 4),
    LayoutRun({"pipeline_parallel": 2}, 2),
    LayoutRun({"context_parallel": 2}, 4),
    LayoutRun({"pipeline_parallel": 2, "pipeline_schedule": "zero_bubble"}, 4),
    LayoutRun({"data_parallel_shard": 2, "tensor_parallel": 2}, 8),
]


def _layout(layout: LayoutRun) -> Any:
    marks = () if layout == LAYOUTS[0] else (pytest.mark.slow,)
    return pytest.param(layout, id=layout.name, marks=marks)


@pytest.mark.parametrize("layout", [_layout(layout) for layout in LAYOUTS])
def test_another_layout_differs_by_rounding_alone(layout: LayoutRun, folder: Path) -> None:
    found = compare_runs(CLEAN, TracedRun(layout, layout.name), folder)
    assert found.outcome == "rounding" and not found.only_in_one, found.as_text()
    assert found.compared > 1500


@pytest.mark.slow
def test_bfloat16_is_rounding_and_the_same_run_is_equal(folder: Path) -> None:
    short = TracedRun(LayoutRun({}, 4, {"dtype": "bfloat16"}), "bfloat16")
    assert compare_runs(CLEAN, short, folder).outcome == "rounding"
    again = TracedRun(LayoutRun({}, 4, {"recompute": "full"}), "again")
    assert compare_runs(CLEAN, again, folder).outcome == "equal"
