"""Attention of bf16 tensors by csrc/attention.cpp: about a third of the time of PyTorch's CPU kernel, whose small
products do not use the bf16 units well, with gradients that are summed in fp32 throughout."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import plain_attention
from anychip.chips.operators.cpu.library import RUNS_HERE, load

_LANES = 16
_Three = ctypes.c_int64 * 3


class _Mask(ctypes.Structure):
    _fields_ = (
        ("visible", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("query", ctypes.c_int64),
    )


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
    """See contract.Attention."""
    if not _suits(q):
        return plain_attention.attention(q, k, v, scale=scale, causal=causal, mask=mask)
    out: Tensor = _forward(q, k, v, mask, scale, causal)[0]
    return out


@torch.no_grad()
def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See contract.AttentionWithLse."""
    if not _suits(q):
        return plain_attention.attention_with_lse(q, k, v, scale=scale, causal=causal, mask=mask)
    return _forward(q, k, v, mask, scale, causal)


@torch.no_grad()
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See contract.AttentionBackward."""
    if not _suits(q):
        return plain_attention.attention_backward(grad_out, q, k, v, out, lse, scale=scale, causal=causal, mask=mask)
    return _backward(grad_out, q, k, v, out, lse, mask, scale, causal)


def _suits(q: Tensor) -> bool:
    """bf16 heads of whole vectors, and more than a few queries: one query of a cached answer is read from memory at
    the same speed by any kernel."""
    return q.dtype == torch.bfloat16 and q.shape[2] >= _LANES and q.shape[3] % _LANES == 0 and RUNS_HERE


# As operators of PyTorch's own, so that compiled code can hold them; compilers learn shapes from the fakes.


@torch.library.custom_op("anychip::attention_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, lse = _empty_result(q)
    visible = _visible(mask, q, k)
    load().attention_forward(
        *_places(q, k, v, out), _address(lse), ctypes.byref(_mask(visible)), _shape(q, k, causal), ctypes.c_float(scale)
    )
    return out, lse


@torch.library.custom_op("anychip::attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = [_rows(x) for x in (grad_out, q, k, v, out)]
    grads = _like(q), _like(k), _like(v)
    lse, visible = lse.contiguous(), _visible(mask, q, k)
    load().attention_backward(
        *_places(*given),
        _address(lse),
        *_places(*grads),
        ctypes.byref(_mask(visible)),
        _shape(q, k, causal),
        ctypes.c_float(scale),
    )
    return grads


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return _empty_result(q)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, mask)


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad_out, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *grads, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of a head side by side, and heads that begin at whole words."""
    return x if x.stride(3) == 1 and not any(stride % 2 for stride in x.stride()[:3]) else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """[b, heads, s, d] in the memory order [b, s, heads, d], which the products before and after want."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _visible(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask for every batch element, head and query, a byte a key; nothing is copied for what it repeats."""
    if mask is None:
        return None
    bytes_in_rows = mask.expand(*mask.shape[:-1], k.shape[2]).contiguous() if mask.stride(-1) != 1 else mask
    return bytes_in_rows.expand(*q.shape[:3], k.shape[2])


def _mask(visible: Tensor | None) -> _Mask:
    return _Mask(None, 0, 0, 0) if visible is None else _Mask(visible.data_ptr(), *visible.stride()[:3])


def _shape(q: Tensor, k: Tensor, causal: bool) -> Any:
    """csrc/attention.cpp, struct Shape."""
    return (ctypes.c_int64 * 7)(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], causal)


def _places(*tensors: Tensor) -> Sequence[Any]:
    """An address and strides for each."""
    return [part for x in tensors for part in (_address(x), _Three(*x.stride()[:3]))]


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
