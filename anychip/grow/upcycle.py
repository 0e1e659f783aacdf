"""A dense model becomes a mixture of experts that computes the same (after arXiv 2212.05055 and 2410.07524).

Expert e is slice e % g of the dense MLP's inner units, where g = intermediate_size / moe_intermediate_size; there are
n_routed_experts / g whole copies of the MLP among them. (g = 1: every expert is a copy.) All slices of a copy have the
same row in the router, so that a token that prefers a copy takes all its slices, and k = num_experts_per_tok is a
multiple of g. Each slice is then weighed by 1 / g in all, and its output is multiplied by g. Which copies a token takes
does not matter yet: they are equal until training makes them differ, each by the tokens it gets.

Shared experts, where the new model has them, are fresh and closed. Everything here is new to the optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anychip.errors import InputError
from anychip.grow.roles import split_layer
from anychip.grow.rows import Kind, Rows
from anychip.model.arithmetic import parameter_shapes
from anychip.model.init import tensor_seed
from anychip.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from anychip.grow.plan import GrowthPlan


def check_upcycling(old: ModelConfig, new: ModelConfig) -> None:
    """Raise InputError unless the dense MLPs of `old` can be cut into the experts of `new` exactly."""
    inner, experts, chosen = new.moe_intermediate_size, new.n_routed_experts, new.num_experts_per_tok
    slices = old.intermediate_size // inner
    if slices * inner != old.intermediate_size or experts % slices or chosen % slices:
        raise InputError(
            f"grow: experts of width {inner} cut an MLP of width {old.intermediate_size} into {slices} slices; "
            f"n_routed_experts {experts} and num_experts_per_tok {chosen} must be multiples of a whole number of them.",
            do="Choose moe_intermediate_size = intermediate_size / g with both numbers multiples of g.",
        )
    if not new.norm_topk_prob:
        raise InputError(
            "grow: with norm_topk_prob false the weights of chosen experts do not add up to a known sum, and the "
            "function cannot be kept.",
            do="Set norm_topk_prob: true.",
        )
    if new.moe_capacity_factor:
        raise InputError("grow: a capacity drops tokens, which changes the function.", do="Set moe_capacity_factor: 0.")


def upcycled_block(plan: GrowthPlan, kind: Kind, name: str, rows: range, old: Rows) -> Tensor:
    """These rows (experts, or units of a shared expert) of a tensor of the new layer's experts or router."""
    shape = dict(parameter_shapes(plan.new))[name]
    parent = f"model.{plan.parent_of(name)}"
    block = old.rows(parent, torch.arange(1)).new_empty((len(rows), *shape[1:]))
    _, end = split_layer(name)
    if kind != "model" or end == "mlp.gate.e_score_correction_bias":
        return block.zero_()
    slices = plan.old.intermediate_size // plan.new.moe_intermediate_size
    if end == "mlp.gate.weight":
        for place, expert in enumerate(rows):
            block[place] = _normal(plan, f"{name}:{expert // slices}", shape[1:])
        return block
    if end.startswith("mlp.shared_experts"):
        if end.endswith("bias"):
            return block.zero_()
        block.copy_(_normal(plan, f"{name}:{rows.start}", block.shape))
        return block.mul_(plan.closed) if "down_proj" in end else block
    for place, expert in enumerate(rows):
        block[place] = _slice(plan, end, parent, expert % slices, old) / plan.new.routed_scaling_factor ** (
            "down_proj" in end
        )
    return block.mul_(slices) if end.endswith("down_proj.weight") else block


def _slice(plan: GrowthPlan, end: str, parent: str, number: int, old: Rows) -> Tensor:
    """One expert's part of the dense MLP's tensor."""
    inner, hidden = plan.new.moe_intermediate_size, plan.old.hidden_size
    part = torch.arange(number * inner, (number + 1) * inner)
    if end.endswith("bias"):  # all chosen experts bring it, with weights that add up to one
        return old.rows(parent, torch.arange(hidden))
    return old.rows(parent, torch.arange(hidden))[:, part] if "down_proj" in end else old.rows(parent, part)


def _normal(plan: GrowthPlan, what: str, shape: tuple[int, ...]) -> Tensor:
    chance = torch.Generator().manual_seed(tensor_seed(plan.seed, f"grow:{what}"))
    return torch.empty(shape).normal_(0.0, plan.new.initializer_range, generator=chance)
