"""The loss of group relative policy optimization (arXiv 2402.03300, section 4) over rows that hold one answer each.

For token t of answer i, with r = p(t) / p_sampled(t), the advantage A of its answer, and d = log p_ref(t) - log p(t):

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta (exp(d) - d - 1)

The last term is the k3 estimator of the divergence from the reference, which is never negative and unbiased. What the
sum over tokens is divided by is `normalization`: sequence, its answer's length and then the number of answers; token,
the number of tokens of all answers (DAPO, arXiv 2503.14476); length, the number of answers times the longest that an
answer may be (Dr. GRPO, arXiv 2503.20783).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.train.objective import Head

Normalization = Literal["sequence", "token", "length"]
_LEAST_SPREAD = 1e-4


@dataclass(frozen=True)
class Policy:
    """The mean loss over answers that bring `advantages`, `sampled` and, with `beta`, `reference`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    normalization: Normalization = "sequence"
    max_new_tokens: int = 1
    by_token: bool = False

    def size(self, batch: Batch) -> int:
        if self.normalization == "token":
            return batch.num_labels
        return len(batch.labels) * (self.max_new_tokens if self.normalization == "length" else 1)

    def complete(self, batch: Batch) -> Batch:
        return batch

    def loss(self, head: Head, hidden: Tensor, part: Batch) -> Tensor:
        assert part.sampled is not None and part.advantages is not None
        now = head.token_log_probabilities(hidden, part.labels)
        learned = (part.labels != IGNORE_LABEL).to(now.dtype)
        ratio = (now - part.sampled.to(now.dtype)).exp()
        advantage = part.advantages.to(now.dtype)[:, None]
        losses = -torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage)
        if self.beta:
            assert part.reference is not None
            losses = losses + self.beta * divergence(now, part.reference.to(now.dtype))
        total = (losses * learned).sum(1)
        return (total / learned.sum(1) if self.normalization == "sequence" else total).sum()


def divergence(now: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimator of KL(now, reference) from log-probabilities of tokens drawn from the first."""
    difference = reference - now
    return difference.exp() - difference - 1


def group_advantages(rewards: Tensor, group_size: int, *, scale: bool) -> Tensor:
    """How much better than the mean of its group each answer is, [answers]; the answers to a question lie together.
    With `scale` in standard deviations (of a sample, and 1e-4 more, as the common libraries have it)."""
    groups = rewards.view(-1, group_size)
    better = groups - groups.mean(1, keepdim=True)
    if scale:
        better = better / (groups.std(1, keepdim=True) + _LEAST_SPREAD)
    return better.flatten()
