"""Activation recomputation: memory for time, by layer (arXiv 1604.06174) or by operator (arXiv 2205.05198)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from anychip.model.decoder import Decoder


def apply_recompute(model: Decoder, mode: Literal["none", "selective", "full"]) -> None:
    """full: keep each layer's input only. selective: keep matrix products and attention, recompute what is cheap
    (norms, rotation, SwiGLU)."""
    if mode == "none":
        return
    for layer in model.layers:
        layer.forward = _recomputed(layer.forward, selective=mode == "selective")


def _recomputed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    extra: dict[str, Any] = {}
    if selective:
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)

    def run(*inputs: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **keywords)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **extra, **keywords)

    return run


def _keep_expensive(context: Any, operator: Any, *inputs: Any, **keywords: Any) -> CheckpointPolicy:
    schema = getattr(operator, "_schema", None)
    kept = schema is not None and (schema.name in _PRODUCTS or "attention" in schema.name or "grouped_m" in schema.name)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm"})
