"""The next token of one answer alone, written down once more: what a step of many answers must choose too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from anychip.recipe.schema import SamplingConfig
from anychip.serve.sampling import draw_token, penalize_repetition


def choose_token(logits: Tensor, seen: Sequence[int], sampling: SamplingConfig, draw: float) -> int:
    """After `seen` (prompt and answer so far), from fp32 logits [vocab_size] and a number in [0, 1)."""
    logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    return int(logits.argmax()) if sampling.is_greedy else draw_token(logits, sampling, draw)
