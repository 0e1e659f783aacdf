"""Every operator and random compositions of them leave the logits what they were; broken rules do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import growth, random_state, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import InputError
from anychip.grow.plan import GrowthPlan, plan_growth
from anychip.grow.proof import LARGEST, prove
from anychip.grow.state import MemoryRows, grow_state
from anychip.model.arithmetic import parameter_shapes
from anychip.recipe.schema import GrowthConfig, ModelConfig

OPERATORS: dict[str, dict[str, Any]] = {
    "hidden, twice": {"hidden_size": 32, "kv_channels": 4},
    "hidden, by a half": {"hidden_size": 24, "kv_channels": 4},
    "ffn": {"intermediate_size": 56},
    "query heads": {"num_attention_heads": 10, "kv_channels": 4},
    "whole groups": {"num_attention_heads": 10, "num_key_value_heads": 5, "kv_channels": 4},
    "key heads alone": {"num_key_value_heads": 4, "kv_channels": 4},
    "smaller groups": {"num_attention_heads": 12, "num_key_value_heads": 12, "kv_channels": 4},
    "depth": {"num_hidden_layers": 7},
    "vocabulary": {"vocab_size": 50},
    "context": {"max_position_embeddings": 256, "rope_scaling": {"base_length": 64, "training_length": 64}},
}


def plan_of(old: ModelConfig, step: GrowthConfig, seed: int = 3) -> GrowthPlan:
    return plan_growth(old, step, seed, distances=[0.3, 0.1, 0.2] if step.layers == "distance" else None)


def assert_preserved(old: ModelConfig, step: GrowthConfig, seed: int = 3, bf16: float = 0.1) -> None:
    plan = plan_of(old, step, seed)
    proof = prove(plan, MemoryRows(random_state(old, seed=seed)), alone=False)
    for precision, limit in LARGEST.items():
        assert proof.largest(precision) <= limit, plan.operators()
    assert proof.passed
    assert proof.largest("bf16") < bf16


@pytest.mark.parametrize("mode", ["immediate", "masked"])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_keeps_the_logits(name: str, mode: str) -> None:
    assert_preserved(small_model(), growth(mode, **OPERATORS[name]))


@pytest.mark.parametrize("layers", ["top", "even", "distance"])
@pytest.mark.parametrize("mode", ["immediate", "masked"])
def test_layers_wherever_they_stand_keep_the_logits(layers: str, mode: str) -> None:
    assert_preserved(small_model(), growth(mode, layers, num_hidden_layers=8))


LATENT: dict[str, Any] = {
    "family": "telechat3-moe", "biases": "none", "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "telechat2": {},
    "telechat2-moe": {"family": "telechat2-moe", **EXPERTS},
    "telechat3": {"family": "telechat3", "biases": "none", "yarn": YARN},
    "teleflm": {"family": "teleflm", "biases": "none", "input_mult": 2.0, "output_mult": 0.5, "mup_scale_factor": 4.0},
    "llama": {"family": "llama", "biases": "none", "tie_word_embeddings": True},
    "mixtral": {"family": "llama", "biases": "none", **EXPERTS},
    "latent": {**LATENT, "q_lora_rank": 8},
    "telechat3-moe": {**LATENT, **EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "scoring_func": "sigmoid",
                      "topk_method": "noaux_tc", "routed_scaling_factor": 2.8, "num_nextn_predict_layers": 1},
}  # fmt: skip


@st.composite
def compositions(draw: st.DrawFn) -> tuple[ModelConfig, GrowthConfig, int]:
    """Any model (each family; MHA, GQA, MQA and latent; with biases and without) and any growth of it that is
    possible."""
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    latent, experts = "kv_lora_rank" in family, "n_routed_experts" in family
    group, keys, width = (
        1 if latent else draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([2, 4])),
    )
    heads: dict[str, Any] = {} if latent else {"kv_channels": width}
    old = small_model(
        **family,
        **heads,
        hidden_size=draw(st.integers(3, 10)) * 2,
        intermediate_size=draw(st.integers(5, 20)),
        num_hidden_layers=3,
        num_attention_heads=group * keys,
        num_key_value_heads=keys,
    )
    new_group, times = 1 if latent else draw(st.integers(1, 4)), draw(st.integers(1, 3))
    new_keys = keys * times * (-(-group // new_group)) if new_group < group else keys + draw(st.integers(0, 3))
    to = {
        **heads,
        "hidden_size": old.hidden_size + draw(st.sampled_from([0, 1, 5, old.hidden_size])),
        "intermediate_size": old.intermediate_size + draw(st.integers(0, 30)),
        "num_hidden_layers": 3 + draw(st.integers(0, 5)),
        "num_attention_heads": new_keys * new_group,
        "num_key_value_heads": new_keys,
        "vocab_size": old.vocab_size + draw(st.integers(0, 3)),
    }
    if to["num_attention_heads"] < old.num_attention_heads:
        to["num_attention_heads"], to["num_key_value_heads"] = old.num_attention_heads, old.num_key_value_heads
    if experts:
        to["moe_intermediate_size"] = old.moe_intermediate_size + draw(st.sampled_from([0, 3, 6]))
    mode, layers = draw(st.sampled_from(["immediate", "masked"])), draw(st.sampled_from(["top", "even", "distance"]))
    return old, growth(mode, layers, **to), draw(st.integers(0, 100))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(compositions())
def test_compositions_keep_the_logits(case: tuple[ModelConfig, GrowthConfig, int]) -> None:
    assert_preserved(*case, bf16=1.0)  # heads of 2 and layers of 6 channels make much of rounding


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=200, deadline=None)
@given(compositions())
def test_two_hundred_compositions_keep_the_logits(case: tuple[ModelConfig, GrowthConfig, int]) -> None:
    assert_preserved(*case, bf16=1.0)  # heads of 2 and layers of 6 channels make much of rounding


def test_growth_in_turn_keeps_the_logits() -> None:
    """Width, then depth, then width again, each on what the one before left."""
    config, state = small_model(), random_state(small_model())
    first = config
    for number, to in enumerate(({"hidden_size": 24, "num_attention_heads": 6}, {"num_hidden_layers": 5},
                                 {"hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 30})):  # fmt: skip
        plan = plan_growth(config, growth(**to), number)
        assert prove(plan, MemoryRows(state), alone=True).passed
        config, state = plan.new, grow_state(plan, state)
    assert {name: tuple(state[f"model.{name}"].shape) for name, _ in parameter_shapes(config)} == dict(
        parameter_shapes(config)
    )
    assert first.num_hidden_layers == 3


def test_stored_weights_lose_nothing_where_all_is_copied() -> None:
    """Shares of a weight add up to it without rounding, so that fp32 weights computed in fp64 agree to fp64."""
    old = small_model()
    state = random_state(old, torch.float32)
    plan = plan_of(old, growth(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, intermediate_size=100,
                               num_hidden_layers=6))  # fmt: skip
    grown = grow_state(plan, state)
    assert prove(plan, MemoryRows(state), MemoryRows(grown)).largest("fp64", "stored") < 1e-13


def test_copies_differ_and_every_new_part_is_used() -> None:
    """Noise makes the copies of a unit unequal where they are read; without it they would learn the same for ever."""
    old = small_model()
    plan = plan_of(old, growth(intermediate_size=48))
    grown = grow_state(plan, random_state(old))
    down = grown["model.layers.0.mlp.down_proj.weight"]
    assert (down[:, :24] - down[:, 24:]).abs().mean() > 0.1 * down.abs().mean()


def test_query_heads_tiled_over_unchanged_key_heads_would_change_the_logits() -> None:
    """The trap that the map of heads avoids: tiling gives copies other keys."""
    old, state = small_model(), random_state(small_model())
    plan = plan_of(old, growth(num_attention_heads=8, kv_channels=4))
    tiled = torch.arange(8) % 4
    object.__setattr__(plan.axes["queries"], "source", (tiled[:, None] * 4 + torch.arange(4)).flatten())
    assert prove(plan, MemoryRows(state), alone=False).largest("fp64") > 0.01


def test_hidden_channels_without_rescaling_would_change_the_logits() -> None:
    old, state = small_model(), random_state(small_model())
    plan = plan_of(old, growth(hidden_size=24, kv_channels=4))
    object.__setattr__(plan.axes["hidden"], "scale", 1.0)
    assert not prove(plan, MemoryRows(state), alone=False).passed


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ({"hidden_size": 8}, "cannot shrink"),
        ({"hidden_size": 32}, "heads are 4 wide and would become 8"),
        ({"rms_norm_eps": 1e-6}, "grow cannot change model.rms_norm_eps"),
    ],
)
def test_growth_that_cannot_be_is_refused(to: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan_growth(small_model(), growth(**to), 0)


def test_heads_without_a_place_are_refused() -> None:
    old = small_model(hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
    with pytest.raises(InputError, match="no place for the 3 query heads"):
        plan_growth(old, growth(num_attention_heads=6, num_key_value_heads=3), 0)
