"""Products that keep less for backward: what is cheap to compute again is not kept.

A product needs its input and its weight again in backward. Kept, the inputs that are norms and SwiGLU take a third of
a layer's activations (arXiv 2205.05198, section 5 counts them), and the casts of fp32 masters as much as the weights,
once per micro-batch in flight. Both are made again here: the first when a caller says how, the second always.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Remake:
    """How to compute a tensor again. It is computed at the first use in backward and let go after the last."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._uses = 0
        self._value: Tensor | None = None

    def promise(self) -> None:
        """One more use is to come."""
        self._uses += 1

    def take(self) -> Tensor:
        if self._value is None:
            with torch.no_grad():
                self._value = self._compute()
        value, self._uses = self._value, self._uses - 1
        if self._uses <= 0:
            self._value = None
        return value


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, remake: Remake | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias, in x's dtype; differentiable in all three.

    `remake` computes x again, bit for bit. A compiler decides by itself what to keep and is left alone.
    """
    bias = None if bias is None else bias.to(x.dtype)
    return sparing(F.linear, x, weight, remake, bias)


def sparing(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, remake: Remake | None, *others: Tensor | None
) -> Tensor:
    """function(x, weight in x's dtype, *others) that keeps neither what `remake` makes again of x, nor the cast."""
    dtype = x.dtype
    products = weight.to(dtype)
    again: list[tuple[Tensor, Remake]] = []
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if remake is not None and x.is_contiguous():
            again.append((x, remake))
        if products is not weight:
            again.append((products, Remake(lambda: weight.to(dtype))))
    return without(again, lambda: function(x, products, *others))


def without(again: list[tuple[Tensor, Remake]], call: Callable[[], Tensor]) -> Tensor:
    """call(), whose backward makes these tensors again, bit for bit, instead of keeping them."""
    if not again or not torch.is_grad_enabled():
        return call()

    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        for tensor, remade in again:
            if _same_memory(saved, tensor):
                return _promised(saved, remade)
        return saved if outer is None else _packed(saved, *outer)

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with saved_tensors_hooks(pack, unpack):
        out = call()
    again.clear()  # the hooks outlive this call and must not keep what they were made to let go
    return out


def _packed(
    saved: Tensor, pack: Callable[[Tensor], object], unpack: Callable[[object], Tensor]
) -> Callable[[], Tensor]:
    """As hooks around ours would have it: PyTorch calls the innermost only, and recomputation of whole layers is one of
    those around."""
    kept = pack(saved)
    return lambda: unpack(kept)


def _promised(saved: Tensor, remade: Remake) -> Callable[[], Tensor]:
    """The view of the remade tensor that `saved` is of the original."""
    remade.promise()
    sizes, strides, offset = saved.shape, saved.stride(), saved.storage_offset()
    return lambda: remade.take().as_strided(sizes, strides, offset)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
