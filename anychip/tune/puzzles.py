"""Short questions with an answer that can be checked, made here: enough of them to learn from, and to hold some out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

from anychip.tune.dialogs import Dialog, question_and_answer

_NUMBERS_ASKED = 4


def largest_number() -> list[Dialog]:
    """Which of four different digits is the largest: 5,040 questions, each a subject of its own below `largest`."""
    return [
        question_and_answer(
            f"Which is the largest: {', '.join(map(str, numbers))}?", str(max(numbers)), f"largest.{numbers}"
        )
        for numbers in permutations(range(10), _NUMBERS_ASKED)
    ]


PUZZLES: dict[str, Callable[[], list[Dialog]]] = {"puzzle:largest": largest_number}
