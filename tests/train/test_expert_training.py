"""A small model of experts, from text to an export in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tiny_run import finish, write_tiny_recipe

MODEL: dict[str, Any] = {
    "family": "telechat3-moe",
    "biases": "none",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "router_aux_loss_coef": 0.001,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
}


def test_it_trains_says_how_even_its_experts_are_and_is_exported(tmp_path: Path) -> None:
    path = write_tiny_recipe(tmp_path, compile=False)
    raw = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**raw, "model": MODEL, "export": {"dtype": "fp32"}}))
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    out = finish(tmp_path, "train", "tiny.yaml")
    assert "busiest expert" in out
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for row in steps:
        assert 1.0 <= row["expert_load_max_mean"] <= row["expert_load_max"] <= 8.0
        assert 0.0 <= row["experts_idle"] < 1.0
        assert "experts" not in row
    finish(tmp_path, "export", str(run))
    config = json.loads((run / "export" / "config.json").read_text())
    assert (config["model_type"], config["n_routed_experts"], config["num_nextn_predict_layers"]) == (
        "deepseek_v3",
        8,
        1,
    )
    check = json.loads((run / "export" / "conversion.json").read_text())["logit_check"]
    assert check["passed"] and check["relative"] < 1e-4
