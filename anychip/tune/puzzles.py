"""Short questions with an answer that can be checked, made here: enough of them to learn from, and to hold some out."""

from __future__ import annotations

import random
from collections.abc import Callable
from string import ascii_lowercase

from anychip.tune.dialogs import Dialog, question_and_answer

_QUESTIONS, _LETTERS_ASKED = 4000, 4


def last_letter() -> list[Dialog]:
    """Which of four different letters comes last in the alphabet: 4,000 questions, each a subject of its own below
    `letters`, so that each is held out by itself. Who names one of the four by chance is right once in four, and who
    always says z, about once in six."""
    chance, asked = random.Random(0), dict[str, None]()
    while len(asked) < _QUESTIONS:
        asked[", ".join(chance.sample(ascii_lowercase, _LETTERS_ASKED))] = None
    return [question_and_answer(f"Which comes last: {listed}?", max(listed), f"letters.{listed}") for listed in asked]


PUZZLES: dict[str, Callable[[], list[Dialog]]] = {"puzzle:letters": last_letter}
