"""Foreign configurations become recipes, or are refused; no bytes at all raise anything else."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.cli import main
from anychip.errors import InputError
from anychip.plan.importers import import_recipe
from anychip.plan.importers.read import KINDS
from anychip.plan.shapes import num_parameters, workload_of
from anychip.recipe import parse_recipe

MINDSPEED = """#!/bin/bash
export HCCL_CONNECT_TIMEOUT=1800
NPUS_PER_NODE=8
NNODES=${NNODES:-64}
TP=8
PP=8
SEQ_LEN=8192   # tokens
DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \\
    --nnodes $NNODES
"
MODEL_ARGS=(
    --num-layers 96
    --hidden-size 8192 --ffn-hidden-size 40960
    --num-attention-heads 64
    --group-query-attention --num-query-groups 8
    --seq-length ${SEQ_LEN}
    --max-position-embeddings $SEQ_LEN
    --swiglu --normalization RMSNorm --norm-epsilon 1e-5
    --position-embedding-type rope --rotary-base 10000
    --untie-embeddings-and-output-weights
    --make-vocab-size-divisible-by 1 --vocab-size 131072
)
TRAINING_ARGS=(--micro-batch-size 1 --global-batch-size 64 --train-iters 2000 --lr 1.5e-4 --bf16
    --recompute-granularity full --recompute-method block)
torchrun $DISTRIBUTED_ARGS pretrain_gpt.py ${MODEL_ARGS[@]} "${TRAINING_ARGS[@]}" \\
    --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size ${PP} \\
    --num-layers-per-virtual-pipeline-stage 4 --sequence-parallel --use-distributed-optimizer
"""
MINDFORMERS = """
runner_config: {batch_size: 1}
lr_schedule: {learning_rate: 1.0e-4}
recompute_config: {recompute: True}
parallel: {enable_parallel_optimizer: True}
parallel_config: {data_parallel: 8, model_parallel: 8, pipeline_stage: 8, micro_batch_num: 8, use_seq_parallel: True}
model:
  model_config:
    num_layers: 96
    hidden_size: 8192
    intermediate_size: 40960
    num_heads: 64
    n_kv_heads: 8
    vocab_size: 131072
    seq_length: 8192
    pp_interleave_num: 3
"""
TORCHTITAN = """
[model]
name = "llama3"
flavor = "70B"
[training]
local_batch_size = 2
global_batch_size = 256
seq_len = 8192
steps = 1000
[parallelism]
data_parallel_shard_degree = 8
tensor_parallel_degree = 4
pipeline_parallel_degree = 4
pipeline_parallel_schedule = "1F1B"
[activation_checkpoint]
mode = "full"
"""
TELECHAT = {
    "model_type": "telechat2", "n_layer": 30, "hidden_size": 4096, "ffn_hidden_size": 12288, "n_head": 32,
    "num_key_value_heads": 32, "vocab_size": 131072, "layer_norm_epsilon": 1e-5, "seq_length": 8192,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 64,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
    "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "num_nextn_predict_layers": 1, "rope_theta": 10000, "rms_norm_eps": 1e-6, "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
QWEN2_MOE = {
    **QWEN3_MOE, "model_type": "qwen2_moe", "head_dim": None, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "norm_topk_prob": False,
}  # fmt: skip
MEGATRON_MOE = """
MODEL_ARGS=(--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 --kv-channels 128
    --multi-latent-attention --kv-lora-rank 512 --q-lora-rank 1536 --qk-head-dim 128 --qk-pos-emb-head-dim 64
    --v-head-dim 128 --qk-layernorm --num-experts 256 --moe-layer-freq [0]*3+[1]*58 --moe-ffn-hidden-size 2048
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk 8 --moe-router-num-groups 8
    --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 2048 --moe-aux-loss-coeff 1e-4
    --moe-router-bias-update-rate 1e-3 --swiglu --normalization RMSNorm --untie-embeddings-and-output-weights
    --disable-bias-linear --vocab-size 129280 --make-vocab-size-divisible-by 1280 --seq-length 4096)
torchrun pretrain_gpt.py ${MODEL_ARGS[@]} --pipeline-model-parallel-size 1 --expert-model-parallel-size 32
"""
MINDSPEED_MOE = """
MLA_ARGS="
    --multi-head-latent-attention \\
    --qk-rope-head-dim 64 \\
    --qk-nope-head-dim 128 \\
    --q-lora-rank 1536 \\
    --kv-lora-rank 512 \\
    --v-head-dim 128 \\
"
MOE_ARGS="--first-k-dense-replace 3 --moe-layer-freq 1 --n-shared-experts 1 --num-experts 256 --moe-router-topk 8
    --moe-intermediate-size 2048 --moe-router-load-balancing-type noaux_tc --n-group 8 --topk-group 4
    --routed-scaling-factor 2.5 --norm-topk-prob --moe-router-score-function sigmoid"
ROPE_ARGS="--rope-scaling-beta-fast 32 --rope-scaling-beta-slow 1 --rope-scaling-factor 40
    --rope-scaling-mscale-all-dim 1.0 --rope-scaling-original-max-position-embeddings 4096 --rope-scaling-type yarn"
msrun pretrain_gpt.py $MLA_ARGS $MOE_ARGS $ROPE_ARGS --num-layers 64 --noop-layers 61,62,63 --hidden-size 7168 \\
    --ffn-hidden-size 18432 --num-attention-heads 128 --vocab-size 129280 --swiglu --normalization RMSNorm \\
    --untie-embeddings-and-output-weights --seq-length 4096 --expert-model-parallel-size 32
"""
MINDFORMERS_MOE = """
runner_config: {batch_size: 1}
parallel_config: {data_parallel: 32, model_parallel: 1, pipeline_stage: 1, expert_parallel: 16}
moe_config: {expert_num: 256, num_experts_chosen: 8, shared_expert_num: 1, routed_scaling_factor: 2.5,
  first_k_dense_replace: 3, moe_intermediate_size: 2048, use_gating_sigmoid: True, balance_via_topk_bias: True,
  norm_topk_prob: True, aux_loss_factors: [0.0001], use_gmm: True, capacity_factor: 1.5, topk_group: 4, n_group: 8}
model:
  model_config: {num_layers: 61, hidden_size: 7168, intermediate_size: 18432, num_heads: 128, n_kv_heads: 128,
    vocab_size: 129280, seq_length: 4096, kv_lora_rank: 512, q_lora_rank: 1536, qk_rope_head_dim: 64,
    qk_nope_head_dim: 128, v_head_dim: 128, theta: 10000.0, extend_method: YARN,
    scaling_factor: {factor: 40.0, beta_fast: 32.0, beta_slow: 1.0, mscale_all_dim: 1.0,
      original_max_position_embeddings: 4096}}
"""
TITAN_MOE = """
[model]
name = "deepseek_v3"
flavor = "671B"
[training]
seq_len = 4096
[parallelism]
data_parallel_shard_degree = 64
expert_parallel_degree = 32
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def recipe_of(path: Path) -> dict[str, Any]:
    found = import_recipe(path)
    workload_of(parse_recipe(found.recipe, str(path)))  # can be planned
    return found.recipe


def test_a_mindspeed_script(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, "pretrain.sh", MINDSPEED))
    assert recipe["model"] | {"rms_norm_eps": 0} == {
        "vocab_size": 131_072, "hidden_size": 8192, "intermediate_size": 40_960, "num_hidden_layers": 96,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 0, "rope_theta": 10_000.0,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    assert recipe["training"]["global_batch_size"] == 64 and recipe["training"]["recompute"] == "full"
    assert recipe["parallel"] == {"tensor_parallel": 8, "pipeline_parallel": 8, "virtual_pipeline": 3,
                                  "pipeline_schedule": "interleaved", "data_parallel_shard": 8}  # fmt: skip
    assert recipe["optimizer"]["lr"] == 1.5e-4


def test_a_vocabulary_is_padded_as_megatron_pads(tmp_path: Path) -> None:
    text = MINDSPEED.replace("--make-vocab-size-divisible-by 1 --vocab-size 131072", "--vocab-size 100000")
    assert recipe_of(write(tmp_path, "a.sh", text))["model"]["vocab_size"] == 100_352  # next multiple of 128 x 8


def test_a_mindformers_file(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, "telechat.yaml", MINDFORMERS))
    assert recipe["parallel"] == {"data_parallel_shard": 8, "tensor_parallel": 8, "pipeline_parallel": 8,
                                  "virtual_pipeline": 3, "pipeline_schedule": "interleaved"}  # fmt: skip
    assert recipe["training"]["global_batch_size"] == 64 and recipe["training"]["recompute"] == "full"
    assert recipe["model"]["num_key_value_heads"] == 8


def test_a_torchtitan_file(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, "llama3_70b.toml", TORCHTITAN))
    assert recipe["model"]["num_hidden_layers"] == 80 and recipe["model"]["rope_theta"] == 500_000.0
    assert recipe["parallel"] == {"data_parallel_shard": 8, "tensor_parallel": 4, "pipeline_parallel": 4,
                                  "pipeline_schedule": "1f1b"}  # fmt: skip
    assert recipe["training"]["micro_batch_size"] == 2


def test_a_telechat_config(tmp_path: Path) -> None:
    folder = tmp_path / "TeleChat2-7B"
    folder.mkdir()
    recipe = recipe_of(write(folder, "config.json", json.dumps(TELECHAT)))
    assert recipe["name"] == "TeleChat2-7B"
    assert recipe["model"]["intermediate_size"] == 12_288 and recipe["model"]["num_hidden_layers"] == 30
    found = import_recipe(folder / "config.json")
    assert any("training.steps" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", json.dumps(DEEPSEEK_V3)),
        ("megatron.sh", MEGATRON_MOE),
        ("mindspeed.sh", MINDSPEED_MOE),
        ("deepseek3.yaml", MINDFORMERS_MOE),
        ("deepseek_v3.toml", TITAN_MOE),
    ],
)
def test_deepseek_v3_is_the_same_model_from_wherever(tmp_path: Path, name: str, text: str) -> None:
    """Its published count: 671 B, 37 B of them active; with the module for a further token 685 B."""
    found = import_recipe(write(tmp_path, name, text))
    model = found.recipe["model"]
    more = model.pop("num_nextn_predict_layers", 0)
    workload = workload_of(parse_recipe(found.recipe, name))
    assert num_parameters(workload) == 671_026_419_200
    active = num_parameters(replace(workload, experts=replace(workload.experts, count=8, ranking_bias=False)))
    assert active == pytest.approx(37.5e9, rel=0.01)
    router = ("scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace")
    assert [model[field] for field in router] == ["sigmoid", "noaux_tc", True, 2.5, 3]
    assert model["family"] == "telechat3-moe" and (more == 1) == (name == "config.json")
    assert any("few groups" in note for note in found.notes)
    assert model.get("yarn", {"factor": 40})["factor"] == 40 and ("yarn" in model) == (name != "megatron.sh")


@pytest.mark.parametrize(
    ("config", "parameters", "noted"),
    [(MIXTRAL, 46_702_792_704, ""), (QWEN3_MOE, 30_532_110_336, "norms of queries"),
     (QWEN2_MOE, 14_315_587_584, "gate of the shared expert")],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)  # fmt: skip
def test_models_with_experts_have_their_published_size(
    tmp_path: Path, config: dict[str, Any], parameters: int, noted: str
) -> None:
    """Published counts less what the notes say is left out: norms of 128 a head kind, biases, one gate a layer."""
    found = import_recipe(write(tmp_path, "config.json", json.dumps(config)))
    assert num_parameters(workload_of(parse_recipe(found.recipe, "config.json"))) == parameters
    assert any(noted in note for note in found.notes)


def test_experts_are_shared_among_shards(tmp_path: Path) -> None:
    assert recipe_of(write(tmp_path, "a.sh", MEGATRON_MOE))["parallel"] == {
        "data_parallel_shard": 32, "expert_parallel": 32,
    }  # fmt: skip
    assert recipe_of(write(tmp_path, "a.yaml", MINDFORMERS_MOE))["parallel"] == {
        "data_parallel_shard": 32, "expert_parallel": 16,
    }  # fmt: skip
    assert recipe_of(write(tmp_path, "a.toml", TITAN_MOE))["parallel"] == {
        "data_parallel_shard": 64, "expert_parallel": 32,
    }  # fmt: skip


def test_tied_embeddings_and_wide_heads_are_taken_over(tmp_path: Path) -> None:
    config = {**MIXTRAL, "model_type": "qwen3", "num_local_experts": None, "head_dim": 192, "tie_word_embeddings": True}
    model = recipe_of(write(tmp_path, "config.json", json.dumps(config)))["model"]
    assert model["kv_channels"] == 192 and model["tie_word_embeddings"] is True and model["biases"] == "none"
    script = MINDSPEED.replace("--untie-embeddings-and-output-weights", "")
    assert recipe_of(write(tmp_path, "a.sh", script))["model"]["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", json.dumps({**DEEPSEEK_V3, "moe_intermediate_size": None}), "experts without their width"),
        ("config.json", json.dumps({**DEEPSEEK_V3, "kv_lora_rank": 0}), "latent attention without kv_lora_rank"),
        ("config.json", json.dumps({**DEEPSEEK_V3, "moe_layer_freq": 2}), "layers without experts behind"),
        ("config.json", json.dumps({**DEEPSEEK_V3, "v_head_dim": 256}), "above the width of keys"),
        ("config.json", json.dumps({**QWEN2_MOE, "shared_expert_intermediate_size": 1000}), "shared expert of width"),
        ("config.json", json.dumps({**QWEN3_MOE, "mlp_only_layers": [5]}), "layers without experts behind"),
        ("config.json", json.dumps({**MIXTRAL, "rope_scaling": {"type": "yarn", "factor": "x"}}), "factor"),
        ("gpt.sh", MEGATRON_MOE.replace("[0]*3+[1]*58", "[1]*3+[0]*58"), "layers without experts behind"),
        ("gpt.sh", MEGATRON_MOE.replace("[0]*3+[1]*58", "every"), "no list of 0 and 1"),
        ("config.json", json.dumps({**TELECHAT, "num_experts": 8}), "mixture of experts"),
        ("config.json", json.dumps({**TELECHAT, "model_type": "gpt2"}), "of type 'gpt2'"),
        ("config.json", json.dumps({"model_type": "llama"}), "does not say vocab_size"),
        ("config.json", "[1]", "does not hold named settings"),
        ("config.json", "{", "is no JSON"),
        ("a.yaml", "a: [", "is no YAML"),
        ("a.toml", "a =", "is no TOML"),
        ("a.toml", '[model]\nname="llama3"\nflavor="9000B"', "the flavour 9000B"),
        ("a.toml", '[model]\nname="llama4"\nflavor="17bx16e"', "the flavour 17bx16e of llama4"),
        ("gpt.sh", "python x.py --num-layers 96 --swiglu", "LayerNorm"),
        ("gpt.sh", "python x.py --normalization RMSNorm --num-layers 96", "without --swiglu"),
        ("gpt.sh", "echo hello", "holds no --arguments"),
        ("gpt.sh", MINDSPEED.replace("PP=8", ""), "pipeline-model-parallel-size is '${PP}'"),
        ("gpt.sh", MINDSPEED.replace("--num-layers 96", "--num-layers many"), "--num-layers is 'many'"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(InputError) as refused:
        import_recipe(path)
    assert message in str(refused.value) and str(path) in str(refused.value)


MINDFORMERS_SHARED = MINDFORMERS.replace("recompute: True", "recompute: False, select_recompute: True")
SIXTEEN_NODES = MINDSPEED.replace("NNODES:-64", "NNODES:-16")


@pytest.mark.parametrize(
    ("name", "text", "devices", "section", "values", "noted"),
    [
        ("a.sh", SIXTEEN_NODES, None, "parallel", {"data_parallel_shard": 2}, "data_parallel_shard is 2"),
        ("a.sh", SIXTEEN_NODES, 512, "parallel", {"data_parallel_shard": 8}, "data_parallel_shard is 8"),
        ("a.sh", SIXTEEN_NODES.replace("--nnodes $NNODES", "--nnodes 3"), None, "parallel", {}, "Give --devices"),
        ("a.sh", MINDSPEED.replace("--use-distributed", "--context-parallel-size 2 --context-parallel-algo "
         "ulysses_cp_algo --use-distributed"), None, "parallel", {"context_method": "ring"}, "ulysses_cp_algo"),
        ("a.sh", MINDSPEED.replace("--use-distributed", "--context-parallel-size 2 --cp-comm-type all_gather "
         "--use-distributed"), None, "parallel", {"context_method": "all_gather"}, ""),
        ("a.sh", MINDSPEED.replace("method block", "method block --recompute-num-layers 4"), None, "training",
         {"recompute": "full"}, ""),
        ("a.sh", MINDSPEED.replace("method block", "method block --recompute-num-layers 2"), None, "training",
         {"recompute": "full"}, "2 of 4 layers"),
        ("a.sh", MINDSPEED.replace("method block", "method block --recompute-num-layers 1"), None, "training",
         {"recompute": "none"}, "1 of 4 layers"),
        ("a.sh", MINDSPEED.replace("--bf16", "--odd-thing 3"), None, "training", {}, "left out: --odd-thing"),
        ("a.sh", MINDSPEED.replace("--bf16", "--fp8-format hybrid"), None, "training", {}, "computes in 8 bits"),
        ("a.sh", MINDSPEED.replace("--bf16", "--optimizer-cpu-offload"), None, "training", {}, "moves states"),
        ("a.sh", MINDSPEED.replace("--bf16", "--adam-beta2 0.99"), None, "optimizer", {"betas": [0.9, 0.99]}, ""),
        ("a.yaml", MINDFORMERS, None, "parallel", {"data_parallel_shard": 8}, "enable_parallel_optimizer"),
        ("a.yaml", MINDFORMERS.replace("optimizer: True", "optimizer: True, parallel_optimizer_config: "
         "{optimizer_weight_shard_size: 4}"), None, "parallel",
         {"data_parallel_shard": 4, "data_parallel_replicate": 2}, "is 4"),
        ("a.yaml", MINDFORMERS_SHARED, None, "training", {"recompute": "selective"}, "select_recompute True"),
        ("a.yaml", MINDFORMERS.replace("recompute: True", "recompute: [1, 2, 0, 0, 0, 0, 0, 0]"), None, "training",
         {"recompute": "none"}, "3 of 96 layers"),
        ("a.yaml", MINDFORMERS.replace("recompute: True", "recompute: True, mp_comm_recompute: True"), None, "training",
         {"recompute": "full"}, "mp_comm_recompute"),
        ("a.toml", TORCHTITAN.replace("degree = 8", "degree = -1"), 64, "parallel", {"data_parallel_shard": 4}, "is 4"),
        ("a.toml", TORCHTITAN.replace("degree = 8", "degree = -1"), None, "parallel", {}, "Give --devices"),
        ("a.toml", TORCHTITAN.replace("degree = 8", "degree = -1"), 17, "parallel", {}, "17 devices are no multiple"),
        ("a.toml", TORCHTITAN.replace('"full"', '"selective"\nselective_ac_option = "2"'), None, "training",
         {"recompute": "full"}, "selective_ac_option 2"),
    ],
)  # fmt: skip
def test_settings_are_taken_over_or_named(
    tmp_path: Path, name: str, text: str, devices: int | None, section: str, values: dict[str, Any], noted: str
) -> None:
    found = import_recipe(write(tmp_path, name, text), devices=devices)
    got = found.recipe[section]
    assert got | values == got and noted in "\n".join(found.notes)
    assert values or "data_parallel_shard" not in got or section != "parallel"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("huggingface", "[" * 900_000),
        ("huggingface", '{"a":' * 100_000),
        ("huggingface", '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}"),
        ("huggingface", '"' + "x" * 900_000),
        ("mindformers", "[" * 190_000),
        ("mindformers", "a: " + "x" * 190_000),
        ("mindformers", "model: &a {model_config: *a}"),
        ("mindformers", "model: &a {model_config: {num_layers: *a}}"),
        ("mindformers", "m0: &m0 [1]\n" + "".join(f"m{n + 1}: &m{n + 1} [*m{n}, *m{n}]\n" for n in range(40))
         + "model: {model_config: {num_layers: *m40}}"),
        ("mindformers", "m0: &m0 {a: 1, b: 2}\n"
         + "".join(f"m{n + 1}: &m{n + 1} {{<<: [*m{n}, *m{n}]}}\n" for n in range(60))),
        ("mindformers", "a: !!bool x"), ("mindformers", "a: !!int ''"), ("mindformers", "a: !!timestamp x"),
        ("mindformers", "model: {model_config: {num_layers: .inf, hidden_size: .nan}}"),
        ("torchtitan", "a." * 90_000 + "b = 1"),
        ("torchtitan", "a = " + "[" * 190_000),
        ("torchtitan", "a = " + "9" * 5000),
        ("torchtitan", 'a = "' + "x" * 190_000),
    ],
    ids=range(18),
)  # fmt: skip
def test_hostile_files_are_refused_soon(tmp_path: Path, kind: Any, text: str) -> None:
    begun = time.process_time()
    with pytest.raises(InputError):
        import_recipe(write(tmp_path, "file", text), kind)
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode())))
def test_no_bytes_raise_anything_but_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, kind: Any, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        import_recipe(path, kind)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*TELECHAT, *DEEPSEEK_V3, *QWEN2_MOE]),
        st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)),
    ),
    st.sampled_from([TELECHAT, DEEPSEEK_V3, QWEN2_MOE, MIXTRAL]),
)
def test_odd_values_are_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], config: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps({**config, **changes, "model_type": config["model_type"]}))
    with contextlib.suppress(InputError):
        import_recipe(path)


def test_the_verb_replaces_a_recipe_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = write(tmp_path, "pretrain.sh", MINDSPEED), tmp_path / "mine.yaml"

    def run(*more: str) -> object:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr("sys.argv", ["anychip", "plan", "import", str(script), "--out", str(out), *more])
            main()
        return ended.value.code or 0

    assert run() == 0 and out.is_file()
    assert "note: --use-distributed-optimizer" in capsys.readouterr().out
    out.write_text("mine")
    assert run() == 2 and out.read_text() == "mine"
    assert "is not overwritten" in capsys.readouterr().err
    assert run("--force", "--devices", "128") == 0 and "data_parallel_shard: 2" in out.read_text()
