"""Attention of single new tokens to the caches of their sequences by csrc/cached_attention.cpp, all in one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from anychip.chips.operators.cpu.library import load


class _Rows(ctypes.Structure):
    _fields_ = (("first", ctypes.c_void_p), ("stride", ctypes.c_int64))


class _Cache(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_void_p),
        ("sequence", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


class _Heads(ctypes.Structure):
    _fields_ = (("queries", ctypes.c_int64), ("groups", ctypes.c_int64), ("size", ctypes.c_int64))


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, scale: float, out: Tensor
) -> None:
    """See prepared.cached_attention."""
    heads = _Heads(q.shape[1], k.shape[1], q.shape[2])
    load().cached_attention(
        *(_rows(x) for x in (q, k, v, out)),
        _cache(keys),
        _cache(values),
        tokens.data_ptr(),
        len(tokens),
        ctypes.byref(heads),
        ctypes.c_float(scale),
    )


def _rows(x: Tensor) -> object:
    """Heads lie one behind the other; so tokens may be narrowed out of wider rows, but not turned around."""
    if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != x.shape[2]):
        raise ValueError("the numbers of a token must lie side by side")
    return ctypes.byref(_Rows(x.data_ptr(), x.stride(0)))


def _cache(x: Tensor) -> object:
    if x.stride(3) != 1 or x.dtype != torch.bfloat16:
        raise ValueError("a cache holds bf16 heads whose numbers lie side by side")
    return ctypes.byref(_Cache(x.data_ptr(), *x.stride()[:3]))
