"""What an evaluation asks of a model, whether it is in this process or behind a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Likelihood(NamedTuple):
    """ln of the probability of a continuation, and whether each of its tokens is the likeliest."""

    log_probability: float
    greedy: bool


class LanguageModel(Protocol):
    @property
    def name(self) -> str:
        """What was asked, in words."""

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each (context, continuation). Spaces at the end of a context belong to the continuation, and the tokens of
        a continuation are those by which the two together are longer than the context: lm-eval's rules."""

    def generate(self, prompts: Sequence[str], stops: Sequence[str], max_new_tokens: int) -> list[str]:
        """The likeliest continuation of each prompt, up to the first of `stops`, which is not part of it."""


def move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context stand before the continuation: a token begins with its space."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of `stops`."""
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]
