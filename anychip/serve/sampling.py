"""From logits to the next token: greedy, or a draw that is a function of (seed, request, index) alone.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p. A draw is one number in [0, 1) taken to a
token through the cumulated probabilities, so an answer can be repeated whatever else was generated beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anychip.recipe.schema import SamplingConfig

_FIRST_CANDIDATES = 256  # top-p rarely needs more; sorting a whole vocabulary costs as much as a small model's step


def uniform_draw(seed: int, request: str, index: int) -> float:
    """A number in [0, 1) for token `index` of a request."""
    digest = hashlib.blake2b(f"{seed}:{index}:{request}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def draw_token(logits: Tensor, sampling: SamplingConfig, draw: float) -> int:
    """The token at `draw`, a number in [0, 1), in the cumulated probabilities of fp32 logits [vocab_size]."""
    tokens, probabilities = candidates(logits, sampling)
    cumulated = probabilities.cumsum(0)
    place = int(torch.searchsorted(cumulated, draw * cumulated[-1], right=True))
    return int(tokens[min(place, len(tokens) - 1)])


def candidates(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn and their fp64 probabilities, which sum to 1.

    top_k keeps the likeliest tokens; top_p, of those, the fewest of the likeliest that together reach it.
    """
    scaled = logits.double() / sampling.temperature
    if sampling.top_k:
        best, tokens = scaled.topk(min(sampling.top_k, len(scaled)))
        probabilities = best.softmax(0)
    elif sampling.top_p < 1:
        everything = scaled.softmax(0)
        probabilities, tokens = everything.topk(min(_FIRST_CANDIDATES, len(everything)))
        if float(probabilities.sum()) < sampling.top_p:
            probabilities, tokens = everything.sort(descending=True)
    else:
        return torch.arange(len(scaled), device=scaled.device), scaled.softmax(0)
    if sampling.top_p < 1:
        kept = int((probabilities.cumsum(0) < sampling.top_p).sum()) + 1
        probabilities, tokens = probabilities[:kept], tokens[:kept]
    return tokens, probabilities / probabilities.sum()


def penalize_repetition(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Make tokens of `seen` less likely: positive logits / penalty, negative ones * penalty (arXiv 1909.05858)."""
    if penalty == 1 or not seen:
        return logits
    tokens = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[tokens]
    return logits.index_copy(0, tokens, torch.where(values > 0, values / penalty, values * penalty))


def penalize_occurrence(logits: Tensor, answered: Mapping[int, int], presence: float, frequency: float) -> Tensor:
    """Make tokens of the answer less likely: logit - presence - frequency * occurrences, as OpenAI's API defines it."""
    if not answered or not (presence or frequency):
        return logits
    tokens = torch.tensor(list(answered), device=logits.device)
    counts = logits.new_tensor(list(answered.values()))
    return logits.index_add(0, tokens, -(presence + frequency * counts))
