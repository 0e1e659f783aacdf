"""What writes answers: whoever serves models gives tuning one of these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from anychip.parallel.processes import Processes


@dataclass(frozen=True)
class Asked:
    """A prompt. `draws` names its random numbers: with the seed they decide every token."""

    prompt: Sequence[int]
    draws: str


@dataclass(frozen=True)
class Said:
    """An answer's tokens, the end of the turn included where it came to that, and ln of the probability of each."""

    tokens: Sequence[int]
    log_probabilities: Sequence[float]


class Sampler(Protocol):
    """Draws answers from the distribution of a model itself: temperature 1, nothing cut off."""

    def join(self, processes: Processes) -> int:
        """Called once, by all processes of a job together, before they load. How many neighbouring processes answer
        together: they must be asked the same, and the first of them has the answers."""

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """From now on answer with these whole tensors by logical name; they do not change while it answers."""

    def sample(self, asked: Sequence[Asked], seed: int, max_new_tokens: int, *, greedy: bool = False) -> list[Said]:
        """One answer a prompt, or none where another process has them; with `greedy` of the likeliest tokens."""
