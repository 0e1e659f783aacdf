"""Parameters and FLOPs agree with the training code's arithmetic, and with published totals of other families."""

from __future__ import annotations

import pytest

from anychip.families.presets import PRESETS
from anychip.model import arithmetic
from anychip.plan.shapes import flops_per_token, num_parameters, work_of, workload_of
from anychip.plan.types import Experts, LatentAttention, Workload
from anychip.recipe.schema import ModelConfig, Recipe


def recipe(preset: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "plan-test",
            "model": PRESETS[preset],
            "data": {"sources": [{"name": "a", "path": "python:stdlib"}]},
            "training": {"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 64, "steps": 1},
        }
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_equal_those_of_the_training_code(preset: str) -> None:
    config = ModelConfig.model_validate(PRESETS[preset])
    workload = workload_of(recipe(preset))
    assert num_parameters(workload) == arithmetic.num_parameters(config)
    work, flops = work_of(workload), arithmetic.flops_per_token(config, 4096)
    assert float(flops_per_token(work)) == flops.model
    assert float(flops_per_token(work, halve_attention=False)) == flops.full


def test_latent_attention_and_experts_reach_the_published_671_billion() -> None:
    """DeepSeek-V3 (arXiv 2412.19437): 671 B parameters, 37 B of them active a token."""
    workload = Workload(
        name="deepseek-v3", layers=61, hidden=7168, ffn=18432, heads=128, kv_heads=128, head_dim=128, vocab=129_280,
        seq_length=4096, global_batch=1, latent=LatentAttention(1536, 512, 128, 64, 128),
        experts=Experts(256, 8, 2048, shared_ffn=2048, dense_layers=3),
    )  # fmt: skip
    assert num_parameters(workload) == pytest.approx(671e9, rel=1e-3)
    active = (float(flops_per_token(work_of(workload))) - 6 * 61 * 128 * 320 * 4096 / 2) / 6
    assert active == pytest.approx(36.6e9, rel=0.02)


def test_plain_gpt_has_its_published_size() -> None:
    """GPT-3 (arXiv 2005.14165): 174.6 B with Megatron's padded vocabulary."""
    gpt = Workload(
        "gpt3", 96, 12288, 49152, 96, 96, 128, 51_200, 2048, 1536, gated=False, biases="all", norm="layer",
        tied_embeddings=True, learned_positions=2048,
    )  # fmt: skip
    assert num_parameters(gpt) == pytest.approx(174.6e9, rel=2e-3)


def test_a_window_shortens_attention_and_nothing_else() -> None:
    full = Workload("m", 32, 4096, 14336, 32, 8, 128, 32_000, 32_768, 8)
    windowed = Workload("m", 32, 4096, 14336, 32, 8, 128, 32_000, 32_768, 8, window=4096)
    assert num_parameters(full) == num_parameters(windowed)
    pairs = 32_768 * 4096 - 4096**2 / 2  # keys that all queries of a sequence meet
    halved = 6 * 32 * 32 * 256 * pairs / 32_768
    matrices = float(flops_per_token(work_of(full))) - 6 * 32 * 32 * 256 * 32_768 / 2
    assert float(flops_per_token(work_of(windowed))) == pytest.approx(matrices + halved)
