"""Growth of every family: latent attention, experts, muP multipliers, tied heads, no biases; dense to experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import growth, random_state, small_model

from anychip.errors import InputError
from anychip.grow.forward import Passed
from anychip.grow.plan import plan_growth
from anychip.grow.proof import alike, prove
from anychip.grow.state import MemoryRows, grow_state
from anychip.model.arithmetic import parameter_shapes
from anychip.model.decoder import Decoder
from anychip.recipe.schema import ModelConfig

LATENT: dict[str, Any] = {
    "family": "telechat3-moe", "biases": "none", "num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "no bias": {"family": "llama", "biases": "none"},
    "tied": {"family": "llama", "biases": "none", "tie_word_embeddings": True},
    "muP": {"family": "teleflm", "biases": "none", "input_mult": 2.0, "output_mult": 0.5, "mup_scale_factor": 4.0},
    "latent": LATENT,
    "latent, experts, further tokens": {**LATENT, **EXPERTS, "num_nextn_predict_layers": 1},
    "telechat2 experts": {"family": "telechat2-moe", **EXPERTS, "first_k_dense_replace": 0, "n_shared_experts": 0},
    "yarn": {"family": "telechat3", "biases": "none", "yarn": {"factor": 4.0, "original_max_position_embeddings": 16}},
}


def growth_of(config: ModelConfig, times: float, mode: str) -> dict[str, Any]:
    to: dict[str, Any] = {
        "hidden_size": round(16 * times),
        "intermediate_size": round(24 * times),
        "num_hidden_layers": 5,
        "num_attention_heads": round(4 * times),
        "num_key_value_heads": round(config.num_key_value_heads * times),
        "vocab_size": 44,
    }
    if config.n_routed_experts:
        to["moe_intermediate_size"] = round(8 * times)
    if config.mup_scale_factor != 1:
        to |= {"mup_scale_factor": 4 * times, "output_mult": 0.7, "input_mult": 1.0}
    return to


@pytest.mark.parametrize("mode", ["immediate", "masked"])
@pytest.mark.parametrize("times", [2, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_keeps_its_logits(family: str, times: float, mode: str) -> None:
    old = small_model(**FAMILIES[family])
    plan = plan_growth(old, growth(mode, **growth_of(old, times, mode)), 5)
    state = random_state(old)
    alone = (times, mode) == (2, "immediate")
    proof = prove(plan, MemoryRows(state), MemoryRows(grow_state(plan, state)), alone=alone)
    assert proof.passed, [c for c in proof.comparisons if not c.passed]
    assert not alone or {c.of for c in proof.comparisons} >= {"all", "hidden_size", "num_hidden_layers"}
    assert proof.largest("fp64", "stored") <= 1e-12


def test_a_choice_that_rounding_decides_ends_what_is_compared_in_short_precisions() -> None:
    old = small_model(**FAMILIES["telechat2 experts"])
    plan = plan_growth(old, growth(hidden_size=32, num_attention_heads=8, num_key_value_heads=4), 5)
    state = random_state(old)
    choices = torch.tensor([[0, 1], [2, 3], [0, 4]])
    other = torch.tensor([[0, 1], [2, 3], [0, 5]])
    passed = [Passed(torch.zeros(3, 40), [], [None, chosen, None]) for chosen in (choices, other)]
    assert alike(plan, passed[0], passed[0]) == 3 and alike(plan, *passed) == 2
    lengths = {c.precision: c.compared for c in prove(plan, MemoryRows(state)).comparisons if c.of == "all"}
    assert lengths["fp64"] == lengths["fp32"] == 64 and 0 < lengths["bf16"] <= 64


def test_modules_for_further_tokens_keep_what_they_say() -> None:
    old = small_model(**FAMILIES["latent, experts, further tokens"])
    plan = plan_growth(old, growth(**growth_of(old, 1.5, "immediate")), 5)
    state = random_state(old)
    tokens = torch.arange(12)[None]
    said = [_further(plan.old, state, tokens), _further(plan.new, grow_state(plan, state), tokens)]
    assert (said[0] - said[1][..., :40]).abs().max() < 1e-12 * said[0].abs().max()


def _further(config: ModelConfig, state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    model = Decoder(config, torch.float64).double()
    model.load_state_dict({name: state[f"model.{name}"] for name, _ in parameter_shapes(config)})
    with torch.no_grad():
        return model.logits(model.further(model(tokens), tokens)[0])


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(("inner", "experts", "chosen"), [(24, 4, 2), (12, 8, 2), (8, 12, 6)])
@pytest.mark.parametrize("mode", ["immediate", "masked"])
def test_dense_becomes_experts_that_compute_the_same(
    mode: str, inner: int, experts: int, chosen: int, shared: int
) -> None:
    """Copied (as wide as the MLP), and split into two or three slices; every router, layers of both kinds."""
    old = small_model()
    to = {
        "family": "telechat2-moe",
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": inner,
        "n_shared_experts": shared,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
    }
    for scores in ({"scoring_func": "softmax"}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}):
        plan = plan_growth(old, growth(mode, **to, **scores), 5)
        state = random_state(old)
        proof = prove(plan, MemoryRows(state))
        assert proof.passed, [c for c in proof.comparisons if not c.passed]
        grown = grow_state(plan, state)
        assert {name.removeprefix("model."): tuple(t.shape) for name, t in grown.items() if name[:6] == "model."} == (
            dict(parameter_shapes(plan.new))
        )
        assert grown["optimizer.step.layers.1.mlp.experts.up_proj.weight"] == 0
        assert grown["optimizer.step.layers.0.mlp.up_proj.weight"] == 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moe_intermediate_size": 10}, "cut an MLP of width 24 into 2 slices"),
        ({"num_experts_per_tok": 1}, "must be multiples"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"moe_capacity_factor": 1.2}, "a capacity drops tokens"),
        ({"hidden_size": 32, "num_attention_heads": 8}, "a growth of its own"),
    ],
)
def test_upcycling_that_would_change_the_function_is_refused(change: dict[str, Any], said: str) -> None:
    to = {"family": "telechat2-moe", "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    with pytest.raises(InputError, match=said):
        plan_growth(small_model(), growth(**{**to, **change}), 0)


def test_experts_are_not_made_more_of() -> None:
    old = small_model(**FAMILIES["telechat2 experts"])
    with pytest.raises(InputError, match="of a model with, or without, experts"):
        plan_growth(old, growth(n_routed_experts=12), 0)
