"""Cross-entropy of bf16 logits by csrc/cross_entropy.cpp: a row's three passes while it is in cache."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from anychip.chips.operators import plain
from anychip.chips.operators.cpu.library import RUNS_HERE, load


@torch.no_grad()
def cross_entropy(logits: Tensor, target: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """See contract.CrossEntropy."""
    if not (RUNS_HERE and logits.dtype == torch.bfloat16 and logits.stride(1) == 1):
        return plain.cross_entropy(logits, target, with_gradient=with_gradient)
    tokens, vocab = logits.shape
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < vocab:
        raise IndexError(f"a target is outside of the vocabulary of {vocab}")
    target = target.contiguous()
    losses = logits.new_empty(tokens, dtype=torch.float32)
    gradient = logits.new_empty(tokens, vocab, dtype=torch.float32) if with_gradient else None
    addresses = [None if x is None else x.data_ptr() for x in (logits, target, losses, gradient)]
    row, label, loss, grad = map(ctypes.c_void_p, addresses)
    stride, count, size = map(ctypes.c_int64, (logits.stride(0), tokens, vocab))
    load().cross_entropy_rows(row, stride, label, loss, grad, count, size)
    return losses, gradient
