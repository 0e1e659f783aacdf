"""Stops a run whose numbers are no longer numbers, before the optimizer changes anything."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from anychip.errors import UnfitError
from anychip.parallel.tensor import local


def check_finite(parameters: Mapping[str, nn.Parameter], step: int, loss: float, grad_norm: float) -> None:
    """Raise UnfitError naming the first bad tensor when the loss or the gradient norm is NaN or infinite."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    what = f"loss is {loss} and grad_norm is {grad_norm} in step {step}"
    raise UnfitError(
        f"Training stopped: {what}; first bad tensor: {_first_bad_tensor(parameters)}. The weights and the optimizer "
        "are as they were before this step.",
        do="Start again from the last checkpoint with a lower learning rate, or look at the documents of this step "
        "(anychip data ledger --step).",
    )


def _first_bad_tensor(parameters: Mapping[str, nn.Parameter]) -> str:
    for name, parameter in parameters.items():
        if not torch.isfinite(local(parameter.detach())).all():
            return f"weight {name}"
    for name, parameter in parameters.items():
        if parameter.grad is not None and (bad := int((~torch.isfinite(local(parameter.grad))).sum())):
            return f"gradient of {name} ({bad:,} of {local(parameter.grad).numel():,} elements)"
    return "none in weights or gradients; the loss itself overflowed"
