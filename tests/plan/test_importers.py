"""Foreign configurations become recipes, or are refused; no bytes at all raise anything else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.cli import main
from anychip.errors import InputError
from anychip.plan.importers import import_recipe
from anychip.plan.importers.read import KINDS
from anychip.plan.shapes import workload_of
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
DEEPSEEK = {"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 256, "hidden_size": 7168}


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
                                  "pipeline_schedule": "interleaved"}  # fmt: skip
    assert recipe["optimizer"]["lr"] == 1.5e-4


def test_a_vocabulary_is_padded_as_megatron_pads(tmp_path: Path) -> None:
    text = MINDSPEED.replace("--make-vocab-size-divisible-by 1 --vocab-size 131072", "--vocab-size 100000")
    assert recipe_of(write(tmp_path, "a.sh", text))["model"]["vocab_size"] == 100_352  # next multiple of 128 x 8


def test_a_mindformers_file(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, "telechat.yaml", MINDFORMERS))
    assert recipe["parallel"] == {"data_parallel_replicate": 8, "tensor_parallel": 8, "pipeline_parallel": 8,
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
    ("name", "text", "message"),
    [
        ("config.json", json.dumps(DEEPSEEK), "latent attention"),
        ("config.json", json.dumps({**TELECHAT, "num_experts": 8}), "mixture of experts"),
        ("config.json", json.dumps({**TELECHAT, "model_type": "gpt2"}), "of type 'gpt2'"),
        ("config.json", json.dumps({"model_type": "llama"}), "does not say vocab_size"),
        ("config.json", "[1]", "does not hold named settings"),
        ("config.json", "{", "is no JSON"),
        ("a.yaml", "a: [", "is no YAML"),
        ("a.toml", "a =", "is no TOML"),
        ("a.toml", '[model]\nname="llama3"\nflavor="9000B"', "the flavour 9000B"),
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
        st.sampled_from([*TELECHAT, "num_experts", "head_dim", "rope_theta"]),
        st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)),
    )
)
def test_odd_values_are_refused(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps({**TELECHAT, **changes, "model_type": "telechat2"}))
    with contextlib.suppress(InputError):
        import_recipe(path)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = write(tmp_path, "pretrain.sh", MINDSPEED), tmp_path / "mine.yaml"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["anychip", "plan", "import", str(script), "--out", str(out)])
        main()
    assert ended.value.code in (0, None) and out.is_file()
    assert "note: --use-distributed-optimizer" in capsys.readouterr().out
