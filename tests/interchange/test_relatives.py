"""Relatives of TeleChat2 in their published layouts: Hugging Face's logits, and every tensor back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODEL, make_run, random_weights, tiny_recipe
from torch import Tensor

from anychip.errors import InputError
from anychip.families.layouts import config_from_json, config_to_json
from anychip.families.presets import PRESETS
from anychip.interchange.export import export_run
from anychip.interchange.import_model import import_model
from anychip.interchange.load import load_for_inference
from anychip.interchange.published import read_json_object
from anychip.recipe.schema import ModelConfig
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore

transformers = pytest.importorskip("transformers")

NEAR = 1e-5
LLAMA = {"family": "llama", "biases": "none"}
EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK = {
    "family": "telechat3-moe",
    "biases": "none",
    "rms_norm_eps": 1e-6,  # what Hugging Face's class has in the norms of latents, whatever its configuration says
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    **EXPERTS,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.8,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.07}
TO_LLAMA = {"dtype": "fp32", "layout": "llama"}
# name -> (fields of the model, class, fields of section export)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama": (LLAMA, "LlamaForCausalLM", {}),
    "llama, tied": ({**LLAMA, "tie_word_embeddings": True}, "LlamaForCausalLM", {}),
    "llama, wide heads": ({**LLAMA, "kv_channels": 12}, "LlamaForCausalLM", {}),
    "llama, yarn": ({**LLAMA, "yarn": {**YARN, "mscale": 0.1}}, "LlamaForCausalLM", {}),
    "mixtral": ({**LLAMA, **EXPERTS}, "MixtralForCausalLM", {}),
    "deepseek-v3": (DEEPSEEK, "DeepseekV3ForCausalLM", {}),
    "deepseek-v3, plain queries": ({**DEEPSEEK, "q_lora_rank": 0}, "DeepseekV3ForCausalLM", {}),
    "deepseek-v3, yarn": ({**DEEPSEEK, "yarn": YARN}, "DeepseekV3ForCausalLM", {}),
    "telechat3": ({"family": "telechat3", "biases": "none", "yarn": YARN}, "LlamaForCausalLM", TO_LLAMA),
    "tele-flm": (
        {"family": "teleflm", "biases": "none", "input_mult": 2.0, "output_mult": 2.0, "mup_scale_factor": 80.0},
        "LlamaForCausalLM",
        TO_LLAMA,
    ),
    "telechat2": ({}, "LlamaForCausalLM", TO_LLAMA),
    "telechat2 of experts": ({"family": "telechat2-moe", "biases": "none", **EXPERTS}, "MixtralForCausalLM", TO_LLAMA),
}


def exported(folder: Path, model: dict[str, Any], **export: Any) -> tuple[RunDirectory, Path]:
    run = make_run(folder / "run", tiny_recipe(model=model, export={"dtype": "fp32", **export}))
    return run, export_run(run)


def our_logits(run: RunDirectory, tokens: Tensor) -> Tensor:
    decoder = load_for_inference(run.root).decoder
    with torch.no_grad():
        return decoder.logits(decoder(tokens))


@pytest.mark.parametrize("name", CASES)
def test_hugging_face_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    model, kind, export = CASES[name]
    run, folder = exported(tmp_path, model, **export)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    assert type(theirs).__name__ == kind
    tokens = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert (our_logits(run, tokens) - expected).abs().max() <= NEAR * max(1.0, float(expected.abs().max()))


OWN_LAYOUTS: dict[str, dict[str, Any]] = {
    "telechat3": {"family": "telechat3", "biases": "none", "yarn": YARN},
    "tele-flm": {"family": "teleflm", "biases": "none", "output_mult": 2.0, "mup_scale_factor": 80.0},
    "telechat3 of experts": {**DEEPSEEK, "num_nextn_predict_layers": 1},
    "telechat2 of experts": {"family": "telechat2-moe", **EXPERTS},
    "mixtral": {**LLAMA, **EXPERTS},
}


@pytest.mark.parametrize("name", OWN_LAYOUTS)
def test_an_export_is_read_back_tensor_by_tensor(tmp_path: Path, name: str) -> None:
    model = OWN_LAYOUTS[name]
    run, folder = exported(tmp_path, model)
    recipe = run.read_recipe()
    path = {"kind": "json", "path": str(folder / "tokenizer.json")}
    again = tiny_recipe("again", model, data={"sources": [{"name": "w", "path": "corpus"}], "tokenizer": path})
    imported = RunDirectory(tmp_path / "again")
    import_model(folder, again, imported)
    store = CheckpointStore(imported.checkpoints)
    weights = random_weights(recipe.model)
    found = dict(store.read(store.open(0), [f"model.{tensor}" for tensor in weights]))
    for tensor, value in weights.items():
        assert torch.equal(found[f"model.{tensor}"], value), tensor


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("telechat2-")])
def test_every_field_of_a_preset_survives_config_json(name: str) -> None:
    config = ModelConfig(**PRESETS[name])
    again, warnings = config_from_json(config_to_json(config, "bfloat16", 1, 2, 3), "config.json")
    of_training = ("router_aux_loss_coef", "mtp_loss_scaling_factor")
    assert again == config.model_copy(update={field: getattr(again, field) for field in of_training})
    assert not warnings


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (DEEPSEEK, "latent attention"),
        ({**LLAMA, **EXPERTS, "n_shared_experts": 1}, "another kind than Mixtral's"),
        ({"family": "teleflm", "biases": "none", "mup_scale_factor": 3.0}, "multipliers that bfloat16"),
        ({"rope_scaling": {"base_length": 64, "training_length": 64}}, "beyond 64 tokens"),
    ],
)
def test_what_llama_cannot_say_is_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    run = make_run(tmp_path / "run", tiny_recipe(model=model, export={"layout": "llama"}))
    with pytest.raises(InputError, match=message):
        export_run(run)
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_interleave": False}, "rope_interleave"),
        ({"n_group": 8}, "n_group"),
        ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_experts_per_tok": 99}, "must be 1 to 6"),
    ],
)
def test_other_variants_of_deepseek_are_refused(changes: dict[str, Any], message: str) -> None:
    raw = config_to_json(ModelConfig(**{**MODEL, **DEEPSEEK}), "bfloat16", 1, 2, 3)
    with pytest.raises(InputError, match=message):
        config_from_json({**raw, **changes}, "config.json")


def test_the_published_spelling_of_telechat3_is_understood(tmp_path: Path) -> None:
    _, folder = exported(tmp_path, OWN_LAYOUTS["telechat3"])
    raw = read_json_object(folder / "config.json")
    assert raw["architectures"] == ["Telechat3ForCausalLM"] and raw["rope_scaling"]["rope_type"] == "telechat3-yarn"
    del raw["rope_scaling"]["attention_factor"]
    config, _ = config_from_json({**raw, "architectures": ["TeleChat3ForCausalLM"]}, "config.json")
    assert config.family == "telechat3" and config.yarn is not None and config.yarn.mscale == 0.07
