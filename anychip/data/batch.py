"""What training takes from data: token ids and what each position should predict."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORE_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """`n` sequences. Tokens, labels and documents are int64 of shape [n, seq].

    `labels` is already shifted by one: `labels[i, j]` is the token that follows `input_ids[i, j]`;
    IGNORE_LABEL (-100) means that a position carries no loss. `documents` number the documents of a row: attention
    stays between equal numbers; None: a row is one text.

    For tuning by comparison: `reference` is what the model that tuning started from says, the log-probability of each
    row's labels [n] or of each label [n, seq]. Where answers were sampled, `sampled` [n, seq] holds the
    log-probabilities under the weights that wrote them, and `advantages` [n] how much better than their group they are.

    `keys` int64 are what dropout is drawn from, one for each token whose hidden states a process holds; whoever trains
    with dropout adds them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    sampled: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    @cached_property
    def num_labels(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE_LABEL).sum())


def number_documents(input_ids: torch.Tensor, end_id: int) -> torch.Tensor:
    """Which document each position belongs to, [n, seq] int64 rising along a row.

    An end of document is what the first token of the next one is predicted from, so it opens that one.
    """
    return (input_ids == end_id).cumsum(1)
