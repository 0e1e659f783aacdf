"""What training takes from data: token ids and what each position should predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORE_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """`n` sequences. Both tensors are int64 of shape [n, seq].

    `labels` is already shifted by one: `labels[i, j]` is the token that follows `input_ids[i, j]`;
    IGNORE_LABEL (-100) means that a position carries no loss.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
