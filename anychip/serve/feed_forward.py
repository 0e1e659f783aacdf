"""The MLP or the experts of a layer as one step of serving computes them, or what a process computes of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anychip.chips.operators import Operators
from anychip.model.decoder import DecoderLayer
from anychip.model.experts import Here, MixtureOfExperts
from anychip.serve.parts import Part
from anychip.serve.products import Precision, Product, make_product


def feed_forward(
    layer: DecoderLayer, precision: Precision, operators: Operators, part: Part, *, release: bool
) -> Product:
    """What a layer does to each token by itself; in several processes, summed up over them."""
    mlp: Any = layer.mlp
    if isinstance(mlp, MixtureOfExperts):
        return _mixture(layer, precision, operators, part, release=release)
    dense = _swiglu(mlp, precision, part)
    return lambda x: part.sum(dense(x))


def _swiglu(mlp: Any, precision: Precision, part: Part) -> Product:
    """An MLP, or its summand that is computed here."""
    inner = [part.rows(linear.weight) for linear in (mlp.gate_proj, mlp.up_proj)]
    gate_up = make_product(torch.cat(inner), None, precision)
    down = make_product(part.columns(mlp.down_proj.weight), part.once(mlp.down_proj.bias), precision)

    def run(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(F.silu(gate) * up)

    return run


def _mixture(layer: DecoderLayer, precision: Precision, operators: Operators, part: Part, *, release: bool) -> Product:
    """The decoder's own router, in fp32 or wider, and those of its experts that are here, in the type of the
    activations. Every process chooses alike; a choice of an expert elsewhere adds nothing here."""
    mixture = layer.mlp if release else copy.deepcopy(layer.mlp)
    assert isinstance(mixture, MixtureOfExperts)
    if release:
        layer.mlp = nn.Identity()  # the layer is emptied next
    shared = None if mixture.shared_experts is None else _swiglu(mixture.shared_experts, precision, part)
    mixture.shared_experts = None
    for parameter in mixture.experts.parameters():
        parameter.data = part.rows(parameter.data).to(precision.activations, copy=part.size > 1)
    mixture.experts.grouped_matmul = operators.grouped_matmul
    count = mixture.config.n_routed_experts // part.size
    first, here = part.rank * count, None if part.size == 1 else Here(count, 0)

    def run(x: Tensor) -> Tensor:
        choice = mixture.gate(x[None])
        if here is not None:
            number = choice.experts - first
            choice = choice._replace(experts=number.where((number >= 0) & (number < count), count))
        answer = mixture.routed(x[None], choice, here=here)
        return part.sum(answer if shared is None else answer + shared(x))

    return run
