"""Which dtype products run in."""

from __future__ import annotations

import torch

from anychip.chips.backend import Backend


def compute_dtype(choice: str, backend: Backend) -> torch.dtype:
    """bf16 or fp32 from a recipe's `compute_dtype`; `auto` takes bf16 where the chip multiplies it in hardware."""
    if choice == "auto":
        return torch.bfloat16 if backend.multiplies_bf16() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[choice]
