"""Training speed of mixtures of experts beside transformers' DeepSeek-V3 and Mixtral classes of the same shape.

Contestants train in turn, each in a process of its own, as in benchmarks/training.py. Prints a table of medians.
Needs the `bench` extra.

    python benchmarks/experts.py --shape deepseek --rounds 5
    python benchmarks/experts.py --shape mixtral --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from contestants import Contestant, Step, answer, anychip_step, set_threads, take_turns, transformers_step

VOCAB, BATCH, SEQ = 8192, 4, 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": SEQ,
    "biases": "none",
}
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek": {
        **COMMON,
        "family": "telechat3-moe",
        "intermediate_size": 1152,
        "num_key_value_heads": 6,
        "q_lora_rank": 192,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 224,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "mixtral": {
        **COMMON,
        "family": "llama",
        "intermediate_size": 768,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 768,
    },
}
# name -> (whose, dtype, compiled, how transformers runs its experts)
CONTESTANTS = {
    "anychip": ("anychip", "auto", False, ""),
    "anychip, compiled": ("anychip", "auto", True, ""),
    "HF bf16 autocast": ("hf", "bf16", False, "eager"),
    "HF bf16 autocast, grouped_mm": ("hf", "bf16", False, "grouped_mm"),
    "HF fp32": ("hf", "fp32", False, "eager"),
    "HF fp32, grouped_mm": ("hf", "fp32", False, "grouped_mm"),
}


def hf_step(shape: str, dtype_name: str, experts: str) -> Step:
    import transformers

    from anychip.families.layouts import config_to_json
    from anychip.recipe.schema import ModelConfig

    raw = config_to_json(ModelConfig(**SHAPES[shape]), "float32", None, 2, None)
    raw = {name: value for name, value in raw.items() if name not in ("torch_dtype", "architectures")}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **{**raw, "use_cache": False})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    return transformers_step(model, BATCH, SEQ, dtype_name)


def work(name: str, shape: str) -> None:
    from anychip.recipe.schema import ModelConfig

    set_threads()
    whose, dtype_name, compiled, experts = CONTESTANTS[name]
    if whose == "anychip":
        answer(anychip_step(ModelConfig(**SHAPES[shape]), BATCH, SEQ, dtype_name, compiled))
    else:
        answer(hf_step(shape, dtype_name, experts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="deepseek")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--worker", choices=CONTESTANTS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.shape)
        return
    from anychip.model.arithmetic import num_active_parameters, num_parameters
    from anychip.recipe.schema import ModelConfig

    config = ModelConfig(**SHAPES[arguments.shape])
    print(f"{num_parameters(config):,} parameters, {num_active_parameters(config):,} active; {BATCH} x {SEQ} tokens\n")
    contestants = {name: Contestant("--worker", name, "--shape", arguments.shape) for name in arguments.only}
    take_turns(contestants.values(), arguments.rounds, warm_up=2)
    rates = {name: BATCH * SEQ / statistics.median(c.seconds) for name, c in contestants.items()}
    others = [name for name in rates if name.startswith("HF")]
    print(f"| {arguments.shape} | tokens/s | peak memory |" + "".join(f" x {name} |" for name in others))
    print("|---|---|---|" + "---|" * len(others))
    for name, rate in rates.items():
        ratios = "".join(f" {rate / rates[other]:.2f} |" for other in others)
        print(f"| {name} | {rate:,.0f} | {contestants[name].memory / 2**30:.2f} GiB |{ratios}")


if __name__ == "__main__":
    main()
