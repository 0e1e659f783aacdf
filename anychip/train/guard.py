"""Stops a run whose numbers are no longer numbers, before the optimizer changes anything."""

from __future__ import annotations

import math

import torch
from torch import nn

from anychip.errors import UnfitError


def check_finite(model: nn.Module, step: int, loss: float, grad_norm: float) -> None:
    """Raise UnfitError naming the first bad tensor when the loss or the gradient norm is NaN or infinite."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    what = f"loss is {loss} and grad_norm is {grad_norm} in step {step}; first bad tensor: {_first_bad_tensor(model)}."
    raise UnfitError(
        f"Training stopped: {what} The weights and the optimizer are as they were before this step.",
        do="Start again from the last checkpoint with a lower learning rate, or look at the documents of this step "
        "(anychip data ledger --step).",
    )


def _first_bad_tensor(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            bad = int((~torch.isfinite(parameter.grad)).sum())
            return f"gradient of {name} ({bad:,} of {parameter.numel():,} elements)"
    return "none in weights or gradients; the loss itself overflowed"
