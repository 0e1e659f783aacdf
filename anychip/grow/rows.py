"""What growth reads: the old state, by rows of named tensors."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Kind = Literal["model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.momentum", "optimizer.step"]
KINDS: tuple[Kind, ...] = (
    "model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.momentum", "optimizer.step",
)  # fmt: skip


class Rows(Protocol):
    """The old state; a tensor's name is KIND.PARAMETER."""

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows int64 [n] (in any order, repeated or not) of a tensor [old, ...] -> [n, ...], safe to change."""

    def mean_row(self, name: str) -> Tensor:
        """The mean over the first dimension, in the tensor's dtype."""
