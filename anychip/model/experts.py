"""A mixture of experts in place of a layer's MLP: a router, experts of which each token chooses few, shared experts.

Rows are sorted by expert once, pass through grouped products (one call for all experts), and come back. Nothing is
dropped unless a capacity is set. Shapes: b batch, s sequence, h hidden, e experts, k experts a token, f inner width,
n = b * s * k rows in the order of experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor

from anychip.chips.operators import Operators, reference
from anychip.chips.operators.contract import ExpertMlp
from anychip.chips.operators.plain_experts import Gather
from anychip.model.layers import MLP
from anychip.model.remake import Remake, product, sparing, without
from anychip.model.routing import add_loss, balance_loss, count_load, z_loss
from anychip.recipe.schema import ModelConfig


class Choice(NamedTuple):
    """Which experts each token chose, and how much each one's answer counts."""

    weights: Tensor  # [b * s, k] in fp32 or wider
    experts: Tensor  # [b * s, k] int64


class Sorted(NamedTuple):
    """Choices in the order of experts."""

    order: Tensor  # [n] int64: which choice stands here
    place: Tensor  # [t * k] int64: where each choice went, n for none
    counts: Tensor  # [e] int64: choices of each expert


class Here(NamedTuple):
    """Of all experts only these many are here; a choice of the number `experts` is answered elsewhere. `choices` says
    how many are answered here where no numbers do (a dry run)."""

    experts: int
    choices: int


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
        self.speaks = True  # for its tokens: of processes that route the same ones, one adds losses and loads
        self.load: Tensor | None = None  # tokens an expert got in training passes since someone took it

    def forward(self, x: Tensor, remake: Remake | None = None) -> Choice:
        """x [b, s, h] -> a choice for each of its tokens, in order."""
        return self.choose(x, self.weight, self.e_score_correction_bias, remake)

    def choose(self, x: Tensor, weight: Tensor, bias: Tensor | None, remake: Remake | None = None) -> Choice:
        config = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        again = _then(remake, lambda rows: rows.to(wide)) if wide != x.dtype else remake
        logits = product(x.to(wide), weight, remake=again).flatten(0, 1)  # [b * s, e]
        scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
        ranked = scores.detach() if bias is None else scores.detach() + bias.detach()
        experts = ranked.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * config.routed_scaling_factor
        if torch.is_grad_enabled():
            weights = self._train(weights, logits, scores, experts, bias, x.shape[0])
        return Choice(weights, experts)

    def _train(
        self, weights: Tensor, logits: Tensor, scores: Tensor, experts: Tensor, bias: Tensor | None, sequences: int
    ) -> Tensor:
        """The weights, whose backward also sees balance and z loss and the load."""
        config = self.config
        counts = count_load(experts, config.n_routed_experts) * self.speaks
        self.load = counts if self.load is None else self.load + counts
        losses = []
        if config.router_aux_loss_coef and self.speaks:
            losses.append(config.router_aux_loss_coef * balance_loss(scores, experts, sequences))
        if config.router_z_loss_coef and self.speaks:
            losses.append(config.router_z_loss_coef * z_loss(logits, sequences))
        bias = bias if bias is not None and bias.requires_grad else None
        if not losses and bias is None:
            return weights
        return add_loss(weights, torch.stack(losses).sum() if losses else None, self.loss_scale, bias, counts)


class Experts(nn.Module):
    """e SwiGLUs side by side. Weights are [e, out, in] fp32 masters. Who shares experts among processes replaces
    `forward`, or what the products hold, from outside."""

    def __init__(self, config: ModelConfig, operators: Operators = reference) -> None:
        super().__init__()
        count, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.grouped_matmul, self.swiglu, self.expert_mlp = (
            operators.grouped_matmul, operators.swiglu, operators.expert_mlp
        )  # fmt: skip
        self.gate_proj = GroupedLinear(count, hidden, inner, bias=False)
        self.up_proj = GroupedLinear(count, hidden, inner, bias=False)
        self.down_proj = GroupedLinear(count, inner, hidden, bias=config.biases == "telechat2")

    def forward(self, x: Tensor, sorted_: Sorted, remake: Remake | None = None, keep: bool = True) -> Tensor:
        """x [t, h] -> each choice's answer [n, h], in the order of experts. keep: whether backward finds what was
        gathered and the SwiGLU."""
        if self.expert_mlp is not None and x.element_size() == 2 and not is_fake(x):
            answers = self._by_one_operator(self.expert_mlp, x, sorted_, remake)
        else:
            answers = self._by_products(x, sorted_, remake, keep)
        return self.down_proj.add_bias(answers, sorted_.counts)

    def _by_one_operator(self, operator: ExpertMlp, x: Tensor, sorted_: Sorted, remake: Remake | None) -> Tensor:
        weights = [linear.held()[0] for linear in (self.gate_proj, self.up_proj, self.down_proj)]
        again = [] if remake is None or not x.is_contiguous() else [(x, remake)]
        return without(again, lambda: operator(x, *sorted_, *weights))

    def _by_products(self, x: Tensor, sorted_: Sorted, remake: Remake | None, keep: bool) -> Tensor:
        matmul, (order, place, counts) = self.grouped_matmul, sorted_
        rows = Gather.apply(x, order, place)
        k = len(place) // max(len(x), 1)
        again = None if keep else _then(remake, lambda x: x.flatten(0, -2)[order // k], x)
        gate = self.gate_proj(matmul, rows, counts, again)
        up = self.up_proj(matmul, rows, counts, again)
        remade = None if keep else Remake(lambda: self.swiglu(gate, up))
        return self.down_proj(matmul, self.swiglu(gate, up), counts, remade)


class GroupedLinear(nn.Module):
    """A product an expert, all in one call: weight [e, out, in], bias [e, out]."""

    def __init__(self, count: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(count, out_features)) if bias else None

    def held(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; of experts that processes share, this process's."""
        return self.weight, self.bias

    def forward(self, matmul: Any, rows: Tensor, counts: Tensor, remake: Remake | None = None) -> Tensor:
        """rows [n, in], the first counts[0] of which are of the first expert, and so on -> [n, out], without bias."""
        return sparing(lambda x, w: matmul(x, w.mT, counts), rows, self.held()[0], remake)

    def add_bias(self, out: Tensor, counts: Tensor) -> Tensor:
        bias = self.held()[1]
        return out if bias is None else out + bias.to(out.dtype).repeat_interleave(counts, 0, output_size=len(out))


class MixtureOfExperts(nn.Module):
    """Sum over the chosen experts of weight * expert(x), plus the shared experts' answer."""

    def __init__(self, config: ModelConfig, operators: Operators = reference) -> None:
        super().__init__()
        self.config, self.combine = config, operators.combine
        self.gate = Router(config)
        self.experts = Experts(config, operators)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = (
            MLP(config.hidden_size, shared, config.biases == "telechat2", operators) if shared else None
        )

    @_disable_dynamo  # how many tokens an expert gets is known at run time
    def forward(self, x: Tensor, *, remake: Remake | None = None, keep: bool = True) -> Tensor:
        """x [b, s, h] -> [b, s, h]. keep: whether backward finds what was gathered for the experts and their SwiGLU,
        or makes them again."""
        choice = self.gate(x, remake)
        out = self.routed(x, choice, remake, keep).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x, remake=remake, keep=keep)

    def routed(
        self, x: Tensor, choice: Choice, remake: Remake | None = None, keep: bool = True, here: Here | None = None
    ) -> Tensor:
        """The chosen experts' weighed answers, [b * s, h]."""
        sorted_ = sort_by_expert(choice.experts, self.config, here)
        answers = self.experts(x.flatten(0, 1), sorted_, remake, keep)
        return self.combine(answers, choice.weights, sorted_.order, sorted_.place)


def sort_by_expert(experts: Tensor, config: ModelConfig, here: Here | None = None) -> Sorted:
    """Choices [t, k] by expert, tokens of one expert in order. With a capacity, an expert's choices beyond it are left
    out."""
    flat = experts.flatten()
    order = torch.sort(flat, stable=True).indices
    counts = count_load(experts, config.n_routed_experts if here is None else here.experts + 1)
    if here is not None:
        counts = counts[: here.experts]
        order = order[: here.choices if is_fake(flat) else int(counts.sum())]
    if config.moe_capacity_factor and not is_fake(flat):
        limit = -int(-config.moe_capacity_factor * len(flat) // config.n_routed_experts)
        starts = counts.cumsum(0) - counts
        within = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
        order, counts = order[within < limit], counts.clamp(max=limit)
    place = torch.full_like(flat, len(order))
    place[order] = torch.arange(len(order), device=flat.device)
    return Sorted(order, place, counts)


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape but no numbers (a dry run): choices are then taken to be even."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def _then(remake: Remake | None, more: Any, kept: Tensor | None = None) -> Remake | None:
    """How to make `more(x)` again, from x made again by `remake` or `kept`."""
    if remake is None:
        return None if kept is None else Remake(lambda: more(kept))
    remake.promise()
    return Remake(lambda: more(remake.take()))
