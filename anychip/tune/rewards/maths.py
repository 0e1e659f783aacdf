"""Is it the same number, expression or set, however it is written? By the library math-verify."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from anychip.errors import InputError
from anychip.tune.rewards.reward import Answered


class Maths:
    """1 where the answer's last expression is mathematically equal to the reference's, else 0. LaTeX and plain
    numbers are understood; an expression that takes longer than the library's own 5 seconds is not equal."""

    def __init__(self) -> None:
        try:
            self._library: Any = import_module("math_verify")
        except ImportError:
            raise InputError(
                "a reward of the kind maths needs the library math-verify, which is not installed.",
                where="tune.grpo.rewards",
                do='Run: pip install "anychip[rewards]"',
            ) from None

    def __call__(self, answered: Answered) -> float:
        if not answered.reference:
            return 0.0
        known, said = self._library.parse(answered.reference), self._library.parse(answered.answer)
        return float(bool(known) and bool(said) and self._library.verify(known, said))
