"""Adapters of a model with experts: beside the matrices that every token meets, the same in training and merging."""

from __future__ import annotations

import torch
from expert_models import SIGMOID

from anychip.model.decoder import Decoder
from anychip.model.lora import add_adapters, freeze, is_adapter
from anychip.recipe.schema import LoraConfig, ModelConfig, Recipe
from anychip.tune.adapters import adapted_tensors


def test_routed_experts_have_none_and_the_balance_stays() -> None:
    lora = LoraConfig(rank=4)
    recipe = Recipe.model_validate(
        {
            "name": "experts",
            "model": SIGMOID,
            "data": {"sources": [{"name": "a", "path": "a"}]},
            "training": {"seq_length": 32, "steps": 1},
        }
    )
    with torch.device("meta"):
        model = Decoder(ModelConfig(**SIGMOID))
        add_adapters(model, lora)
    freeze(model)
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
    wanted = {half: shape for halves in adapted_tensors(recipe, lora).values() for half, shape in halves.items()}
    assert found == wanted
    assert {name.split(".")[-3] for name in found} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("experts.gate_proj" in name and "shared" not in name for name in found)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "correction_bias" in name)
