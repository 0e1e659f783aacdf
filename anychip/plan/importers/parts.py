"""Experts and latent attention of foreign models in the recipe's words, or a refusal that says which part has none."""

from __future__ import annotations

from typing import Any

from anychip.plan.importers.found import Found

MOST_LAYERS = 10_000


def experts(
    found: Found,
    *,
    count: int,
    chosen: int | None,
    inner: int | None,
    shared_inner: int = 0,
    dense_first: int = 0,
    sigmoid: bool = False,
    ranking_bias: bool = False,
    renormalised: bool = True,
    scaling: float | None = None,
    balance_loss: float | None = None,
    z_loss: float | None = None,
    capacity: float | None = None,
    groups: int | None = None,
) -> dict[str, Any]:
    """Fields of `model` for a mixture of experts; None: the source does not say."""
    if not inner or not chosen:
        found.refuse(f"{count} experts without their width or how many a token chooses")
    if shared_inner % inner:
        found.refuse(f"a shared expert of width {shared_inner} beside experts of width {inner}")
    if groups and groups > 1:
        found.notes.append("its tokens choose among the experts of few groups only; ours choose among all")
    return {
        "n_routed_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": inner,
        "n_shared_experts": shared_inner // inner,
        "first_k_dense_replace": dense_first,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if ranking_bias else "greedy",
        "norm_topk_prob": renormalised,
        "routed_scaling_factor": scaling,
        "router_aux_loss_coef": balance_loss,
        "router_z_loss_coef": z_loss,
        "moe_capacity_factor": capacity if capacity and capacity > 0 else None,
    }


def latent_attention(
    *,
    heads: int | None,
    q_rank: int | None,
    kv_rank: int,
    nope: int | None,
    rope: int | None,
    value: int | None,
) -> dict[str, Any]:
    """Fields of `model` for multi-head latent attention, in which every head has keys and values of its own."""
    return {
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank or 0,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
    }


def without_biases(model: dict[str, Any]) -> dict[str, Any]:
    """The family of a model without biases: the one whose weights are published in the layout that it could have."""
    deepseek = (
        model.get("kv_lora_rank")
        and model.get("n_shared_experts")
        and model.get("scoring_func") == "sigmoid"
        and model.get("topk_method") == "noaux_tc"
    )
    return {"family": "telechat3-moe" if deepseek else "llama", "biases": "none"}


def expert_parallel(found: Found, degree: int | None, shard: int | None = None) -> dict[str, Any]:
    """Fields of `parallel`: our experts are shared among the shards of one copy of the model."""
    if not degree or degree == 1:
        return {}
    if shard is None or shard % degree:
        shard = degree
        found.notes.append(f"parallel.data_parallel_shard is {degree}, as many as share the experts; more share states")
    return {"expert_parallel": degree, "data_parallel_shard": shard}


def shared_states(found: Found, setting: str, shard: int | None, stages: int, experts: int = 1) -> None:
    """Say what became of a setting that shares optimizer states among copies; None: the degree is not known."""
    if shard is None:
        instead = f"as many as share the experts ({experts})" if experts > 1 else "none"
        found.notes.append(
            f"{setting}: how many processes share states is not in the source; in the recipe {instead} do. "
            "Give --devices, or set parallel.data_parallel_shard"
        )
    elif shard > 1:
        more = "" if stages > 1 else "; without a pipeline ours shares weights and gradients too (ZeRO 3)"
        found.notes.append(f"{setting}: parallel.data_parallel_shard is {shard}, as many as share states{more}")


def nearest_recompute(found: Found, setting: str, count: int, of: int, where: str = "a stage") -> str:
    """`training.recompute` for a setting that computes `count` of `of` layers again: recipes say all or none."""
    if count >= of:
        return "full"
    taken = "full" if 2 * count >= of else "none"
    than = "less memory and more time" if taken == "full" else "more memory and less time"
    found.notes.append(
        f"{setting}: {count} of {of} layers of {where} are computed again; recipes say all or none, "
        f"and recompute {taken} was taken ({than} than in the source)"
    )
    return taken


def from_on(first: int, step: int, layers: int) -> list[bool]:
    """By layer: experts in every `step`-th one, counted from 0, but not before `first`."""
    return [layer >= first and layer % step == 0 for layer in range(min(layers, MOST_LAYERS))]


def dense_first(found: Found, has_experts: list[bool]) -> int:
    """Leading layers without experts. Other patterns are refused."""
    first = next((layer for layer, moe in enumerate(has_experts) if moe), len(has_experts))
    if not all(has_experts[first:]):
        found.refuse("layers without experts behind layers with them")
    return first
