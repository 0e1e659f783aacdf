"""What a job minimises: an objective is given the final hidden states of some rows and the head that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.chips.operators import reference
from anychip.chips.operators.contract import CrossEntropy
from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.train.loss import head_cross_entropy, head_token_losses


@dataclass(frozen=True)
class Head:
    """The output head: this process's rows of the vocabulary, the group that holds the others, and how many tokens'
    logits exist at a time."""

    weight: Tensor
    chunk_tokens: int
    group: dist.ProcessGroup | None = None
    cross_entropy: CrossEntropy = reference.cross_entropy
    all_labelled: bool = False

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy in nats summed over all labels; hidden [b, s, h], labels [b, s]."""
        return head_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            self.chunk_tokens,
            self.group,
            all_labelled=self.all_labelled,
            cross_entropy=self.cross_entropy,
        )

    def log_probabilities(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The log-probability of each row's labels, [b] in fp32 or wider; differentiable as `loss` is."""
        kept, losses = self._losses(hidden, labels)
        return -losses.new_zeros(len(labels)).index_add(0, kept // labels.shape[1], losses)

    def token_log_probabilities(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The log-probability of each label, [b, s] in fp32 or wider, 0 where there is none; differentiable."""
        kept, losses = self._losses(hidden, labels)
        return -losses.new_zeros(labels.numel()).index_copy(0, kept, losses).view_as(labels)

    def _losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which places of all rows carry labels, and the cross-entropy of each."""
        kept = (labels.flatten() != IGNORE_LABEL).nonzero().squeeze(1)
        states, targets = hidden.flatten(0, 1)[kept], labels.flatten()[kept]
        return kept, head_token_losses(states, self.weight, targets, self.chunk_tokens, self.group, self.cross_entropy)


class Objective(Protocol):
    """A sum over rows, divided by a size of the whole batch before backward."""

    @property
    def by_token(self) -> bool:
        """Whether it is a sum over tokens: any part of a sequence, and any stage of a pipeline, then has its share."""

    def size(self, batch: Batch) -> int:
        """What the sum over a global batch is divided by."""

    def complete(self, batch: Batch) -> Batch:
        """The global batch with what the loss needs besides tokens; called by all processes together."""

    def loss(self, head: Head, hidden: Tensor, part: Batch) -> Tensor:
        """The sum over these rows, a scalar; hidden [b, s, h] of `part`'s tokens."""


class NextToken:
    """Cross-entropy a label: pretraining and supervised tuning."""

    by_token = True

    def size(self, batch: Batch) -> int:
        return batch.num_labels

    def complete(self, batch: Batch) -> Batch:
        return batch

    def loss(self, head: Head, hidden: Tensor, part: Batch) -> Tensor:
        return head.loss(hidden, part.labels)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch."""

    def some(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[rows]

    others = (batch.documents, batch.reference, batch.sampled, batch.advantages, batch.keys)
    return Batch(batch.input_ids[rows], batch.labels[rows], *map(some, others))
