"""The rewards of a recipe, each by its kind, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anychip.recipe.schema import RewardConfig

Score = Callable[["Answered"], float]


@dataclass(frozen=True)
class Answered:
    """An answer to judge: the text that was said (without the end of the turn), what was asked, and what is known of
    good answers."""

    answer: str
    question: str
    reference: str = ""
    tests: str = ""


@dataclass(frozen=True)
class Reward:
    """Scores and their weights. The first decides what counts as a success: a score of 1 or more."""

    scores: tuple[Score, ...]
    weights: tuple[float, ...]

    def all(self, answered: Answered) -> list[float]:
        """Every score, unweighted."""
        return [score(answered) for score in self.scores]

    def total(self, scores: Sequence[float]) -> float:
        return sum(weight * score for weight, score in zip(self.weights, scores, strict=True))


def make_reward(configs: Sequence[RewardConfig]) -> Reward:
    """Raises InputError at once for what cannot work: a library or function that is not there, a broken pattern."""
    return Reward(tuple(_score(config) for config in configs), tuple(config.weight for config in configs))


def _score(config: RewardConfig) -> Score:
    """A kind's file is imported when it is asked for."""
    if config.kind == "exact":
        from anychip.tune.rewards.exact import exact

        return exact
    if config.kind == "pattern":
        from anychip.tune.rewards.pattern import Pattern

        return Pattern(config.pattern)
    if config.kind == "maths":
        from anychip.tune.rewards.maths import Maths

        return Maths()
    if config.kind == "code":
        from anychip.sandbox import Limits
        from anychip.tune.rewards.code import Code

        return Code(Limits(config.seconds, config.memory_bytes))
    from anychip.tune.rewards.custom import custom

    return custom(config.function)
