"""A mixture of experts in place of a layer's MLP: a router, experts of which each token chooses few, shared experts.

Rows are sorted by expert once, pass through grouped products (one call for all experts), and come back. Nothing is
dropped unless a capacity is set. Shapes: b batch, s sequence, h hidden, e experts, k experts a token, f inner width,
n = b * s * k rows in the order of experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anychip.chips.operators import Operators, reference
from anychip.model.layers import MLP
from anychip.model.remake import Remake, product, sparing
from anychip.model.routing import add_loss, balance_loss, count_load, z_loss
from anychip.recipe.schema import ModelConfig


class Choice(NamedTuple):
    """Which experts each token chose, and how much each one's answer counts."""

    weights: Tensor  # [b * s, k] in fp32 or wider
    experts: Tensor  # [b * s, k] int64


class Router(nn.Module):
    """Scores in fp32 from fp32 weights: a choice among hundreds hangs on small differences.

    softmax (arXiv 2101.03961) or sigmoid scores (2412.19437); with `noaux_tc` the choice, but not the weights, goes by
    score plus a bias (2408.15664). That bias has no gradient of a loss: what it gets as one in backward is the number
    of tokens that chose each expert, which adds up over micro-batches and processes as gradients do, and the optimizer
    moves it by the sign of (load - mean load).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = (
            nn.Parameter(torch.empty(config.n_routed_experts)) if config.topk_method == "noaux_tc" else None
        )
        self.loss_scale = 1.0  # of balance and z loss, summed over this process's sequences; who trains sets it
        self.load: Tensor | None = None  # tokens an expert got in training passes since someone took it

    def forward(self, x: Tensor, remake: Remake | None = None) -> Choice:
        """x [b, s, h] -> a choice for each of its tokens, in order."""
        config = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        again = _then(remake, lambda rows: rows.to(wide)) if wide != x.dtype else remake
        logits = product(x.to(wide), self.weight, remake=again).flatten(0, 1)  # [b * s, e]
        scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
        ranked = scores.detach()
        if self.e_score_correction_bias is not None:
            ranked = ranked + self.e_score_correction_bias.detach()
        experts = ranked.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * config.routed_scaling_factor
        if torch.is_grad_enabled():
            weights = self._train(weights, logits, scores, experts, x.shape[0])
        return Choice(weights, experts)

    def _train(self, weights: Tensor, logits: Tensor, scores: Tensor, experts: Tensor, sequences: int) -> Tensor:
        """The weights, whose backward also sees balance and z loss and the load."""
        config = self.config
        counts = count_load(experts, config.n_routed_experts)
        self.load = counts if self.load is None else self.load + counts
        losses = []
        if config.router_aux_loss_coef:
            losses.append(config.router_aux_loss_coef * balance_loss(scores, experts, sequences))
        if config.router_z_loss_coef:
            losses.append(config.router_z_loss_coef * z_loss(logits, sequences))
        bias = self.e_score_correction_bias
        bias = bias if bias is not None and bias.requires_grad else None
        if not losses and bias is None:
            return weights
        return add_loss(weights, sum(losses) if losses else None, self.loss_scale, bias, counts)


class Experts(nn.Module):
    """e SwiGLUs side by side. Weights are [e, out, in] fp32 masters. Who shares experts among processes replaces
    `forward` from outside."""

    def __init__(self, config: ModelConfig, operators: Operators = reference) -> None:
        super().__init__()
        count, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.grouped_matmul, self.swiglu = operators.grouped_matmul, operators.swiglu
        self.gate_proj = GroupedLinear(count, hidden, inner, bias=False)
        self.up_proj = GroupedLinear(count, hidden, inner, bias=False)
        self.down_proj = GroupedLinear(count, inner, hidden, bias=config.biases == "telechat2")

    def forward(self, rows: Tensor, counts: Tensor, remake: Remake | None = None, keep: bool = True) -> Tensor:
        """rows [n, h] sorted by expert, counts [e] int64 -> [n, h]. keep: whether backward finds the SwiGLU."""
        matmul = self.grouped_matmul
        gate = self.gate_proj(matmul, rows, counts, remake)
        up = self.up_proj(matmul, rows, counts, remake)
        again = None if keep else Remake(lambda: self.swiglu(gate, up))
        return self.down_proj(matmul, self.swiglu(gate, up), counts, again)


class GroupedLinear(nn.Module):
    """A product an expert, all in one call: weight [e, out, in], bias [e, out]."""

    def __init__(self, count: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(count, out_features)) if bias else None

    def forward(self, matmul: Any, rows: Tensor, counts: Tensor, remake: Remake | None = None) -> Tensor:
        return self.multiply(matmul, rows, counts, self.weight, self.bias, remake)

    def multiply(
        self, matmul: Any, rows: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None, remake: Remake | None
    ) -> Tensor:
        """rows [n, in], the first counts[0] of which are of the first expert, and so on -> [n, out]."""
        out = sparing(lambda x, w: matmul(x, w.mT, counts), rows, weight, remake)
        return out if bias is None else out + bias.to(out.dtype).repeat_interleave(counts, 0, output_size=len(out))


class MixtureOfExperts(nn.Module):
    """Sum over the chosen experts of weight * expert(x), plus the shared experts' answer."""

    def __init__(self, config: ModelConfig, operators: Operators = reference) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config, operators)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = (
            MLP(config.hidden_size, shared, config.biases == "telechat2", operators) if shared else None
        )

    @torch._disable_dynamo  # how many tokens an expert gets is known at run time
    def forward(self, x: Tensor, *, remake: Remake | None = None, keep: bool = True) -> Tensor:
        """x [b, s, h] -> [b, s, h]. keep: whether backward finds what was gathered for the experts and their SwiGLU,
        or makes them again."""
        choice = self.gate(x, remake)
        out = self.routed(x, choice, remake, keep).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x, remake=remake, keep=keep)

    def routed(self, x: Tensor, choice: Choice, remake: Remake | None = None, keep: bool = True) -> Tensor:
        """The chosen experts' weighed answers, [b * s, h]."""
        order, place, counts = sort_by_expert(choice.experts, self.config)
        rows = Gather.apply(x.flatten(0, 1), order, place)
        k = choice.experts.shape[1]
        again = None if keep else _then(remake, lambda x: x.flatten(0, 1)[order // k], x)
        return Combine.apply(self.experts(rows, counts, again, keep), choice.weights, order, place)


def sort_by_expert(experts: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Choices [t, k] -> (order [n]: choices by expert, tokens of one expert in order; place [t * k]: where each choice
    went, n for none; counts [e]). With a capacity, an expert's choices beyond it are left out."""
    flat = experts.flatten()
    order = torch.sort(flat, stable=True).indices
    counts = count_load(experts, config.n_routed_experts)
    if config.moe_capacity_factor and not is_fake(flat):
        limit = -int(-config.moe_capacity_factor * len(flat) // config.n_routed_experts)
        starts = counts.cumsum(0) - counts
        within = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
        order, counts = order[within < limit], counts.clamp(max=limit)
    place = torch.full_like(flat, len(order))
    place[order] = torch.arange(len(order), device=flat.device)
    return order, place, counts


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape but no numbers (a dry run): choices are then taken to be even."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


class Gather(torch.autograd.Function):
    """rows [t, h] -> [n, h], the row of each choice in the order of experts. Backward adds up each token's k."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.tokens = len(rows)
        return rows.index_select(0, order // (len(place) // len(rows)))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        order, place = ctx.saved_tensors
        (grad,) = grad_outputs
        return _of_choices(grad, order, place).view(ctx.tokens, -1, grad.shape[1]).sum(1), None, None


class Combine(torch.autograd.Function):
    """Answers [n, h] and weights [t, k] -> each token's weighed sum, [t, h] in the answers' dtype, added up in that of
    the weights."""

    @staticmethod
    def forward(ctx: Any, answers: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(answers, weights, order)
        chosen = _of_choices(answers, order, place).view(*weights.shape, -1)
        total = chosen[:, 0].to(weights.dtype) * weights[:, :1]
        for number in range(1, weights.shape[1]):
            total.addcmul_(chosen[:, number].to(weights.dtype), weights[:, number : number + 1])
        return total.to(answers.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        answers, weights, order = ctx.saved_tensors
        grad, k = grad_outputs[0], weights.shape[1]
        rows = grad.index_select(0, order // k)  # of each answer, in the order of experts
        by_answer = (rows * answers).sum(-1, dtype=weights.dtype)
        grad_weights = weights.new_zeros(weights.numel()).index_copy_(0, order, by_answer).view_as(weights)
        grad_answers = rows.mul_(weights.flatten()[order, None].to(rows.dtype))
        return grad_answers, grad_weights, None, None


def _of_choices(rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Rows in the order of experts -> [t * k, h] in the order of choices, zero for those left out."""
    if len(order) == len(place):
        return rows.index_select(0, place)
    return rows.new_zeros(len(place), rows.shape[1]).index_copy_(0, order, rows)


def _then(remake: Remake | None, more: Any, kept: Tensor | None = None) -> Remake | None:
    """How to make `more(x)` again, from x made again by `remake` or `kept`."""
    if remake is None:
        return None if kept is None else Remake(lambda: more(kept))
    remake.promise()
    return Remake(lambda: more(remake.take()))
