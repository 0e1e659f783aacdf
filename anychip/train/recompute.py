"""Activation recomputation: memory for time, by layer (arXiv 1604.06174) or by operator (arXiv 2205.05198)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from anychip.model.decoder import Decoder, further_modules


def apply_recompute(model: Decoder, mode: Literal["none", "selective", "full"]) -> None:
    """full: keep each layer's input only. selective: keep what products and attention need, compute norms and SwiGLU
    again."""
    layer: Any
    for layer in (*model.layers, *(module.layer for module in further_modules(model))):
        if mode == "full":
            layer.forward = _recomputed(layer.forward)
        layer.keep_cheap = mode != "selective"


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **keywords)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **keywords)

    return run
