"""What decoder layers are made of: norm, product, adapter, SwiGLU.

Parameters are fp32 masters; products run in the dtype of the activations, norms in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anychip.chips.operators import Operators, reference
from anychip.model.remake import Remake, product


class RMSNorm(nn.Module):
    """x / rms(x) * weight in fp32 (arXiv 1910.07467), returned in x's dtype."""

    def __init__(self, size: int, eps: float, operators: Operators = reference) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.rms_norm = eps, operators.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight)

    def normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.rms_norm(x, weight, self.eps)


class Adapter(nn.Module):
    """scale * b a x beside a matrix, with a [rank, in] and b [out, rank]; see `lora`."""

    def __init__(self, linear: Linear, rank: int, scale: float) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor, remake: Remake | None = None) -> Tensor:
        return self.adapt(x, self.a, self.b, remake)

    def adapt(self, x: Tensor, a: Tensor, b: Tensor, remake: Remake | None = None) -> Tensor:
        return product(product(x, a, remake=remake), b) * self.scale


class Linear(nn.Module):
    """A product in the dtype of its input; `weight` [out, in] stays the fp32 master. What an `adapter` computes from
    the same input is added."""

    adapter: Adapter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter = None

    def forward(self, x: Tensor, remake: Remake | None = None) -> Tensor:
        out = product(x, self.weight, self.bias, remake)
        return out if self.adapter is None else out + self.adapter(x, remake)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, inner_size: int, down_bias: bool, operators: Operators = reference) -> None:
        super().__init__()
        self.swiglu = operators.swiglu
        self.gate_proj = Linear(hidden_size, inner_size, bias=False)
        self.up_proj = Linear(hidden_size, inner_size, bias=False)
        self.down_proj = Linear(inner_size, hidden_size, bias=down_bias)

    def forward(self, x: Tensor, *, remake: Remake | None = None, keep: bool = True) -> Tensor:
        """keep: whether backward finds the SwiGLU, or computes it again from gate and up."""
        gate, up = self.gate_proj(x, remake), self.up_proj(x, remake)
        return self.down_proj(self.swiglu(gate, up), None if keep else Remake(lambda: self.swiglu(gate, up)))
