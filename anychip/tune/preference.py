"""Direct preference optimization (arXiv 2305.18290) and its identity form (IPO, arXiv 2310.12036) over pairs of rows.

With h = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)):

    dpo    -log sigmoid(beta * h)
    ipo    (h - 1 / (2 beta)) ** 2, where every log-probability is the mean over the answer's tokens

The mean over tokens in ipo is what its authors and the common libraries use: sums would favour short answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.train.objective import Head

Loss = Literal["dpo", "ipo"]


@dataclass(frozen=True)
class Preference:
    """The mean loss over pairs; row 2 i of a batch is preferred to row 2 i + 1. `reference` computes what a batch does
    not bring: the log-probabilities of all its rows, the same on all processes."""

    kind: Loss
    beta: float
    reference: Callable[[Batch], Tensor] | None = None
    by_token: bool = False

    def size(self, batch: Batch) -> int:
        return len(batch.labels) // 2

    def complete(self, batch: Batch) -> Batch:
        if batch.reference is not None or self.reference is None:
            return batch
        return replace(batch, reference=self.reference(batch))

    def loss(self, head: Head, hidden: Tensor, part: Batch) -> Tensor:
        assert part.reference is not None
        log_probabilities = head.log_probabilities(hidden, part.labels)
        return preference_losses(log_probabilities, part.reference, part.labels, self.kind, self.beta).sum()


def preference_losses(log_probabilities: Tensor, reference: Tensor, labels: Tensor, kind: Loss, beta: float) -> Tensor:
    """The loss of each pair, [rows / 2], from the rows' log-probabilities under the model and its reference [rows] and
    their labels [rows, s]."""
    gained = log_probabilities - reference.to(log_probabilities.dtype)
    if kind == "ipo":
        gained = gained / (labels != IGNORE_LABEL).sum(1)
    margin = gained[0::2] - gained[1::2]
    return (margin - 1 / (2 * beta)).square() if kind == "ipo" else -F.logsigmoid(beta * margin)
