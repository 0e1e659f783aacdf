"""Does the answer have the wanted form?"""

from __future__ import annotations

import regex

from anychip.errors import InputError
from anychip.tune.rewards.reward import Answered

_SECONDS = 1.0


class Pattern:
    """1 where the whole answer matches a regular expression (`.` also matches a line feed), else 0. A match that takes
    longer than a second is none: some expressions take for ever on some texts."""

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise InputError(
                f"the pattern {pattern!r} is no regular expression ({error}).", where="tune.grpo.rewards"
            ) from None

    def __call__(self, answered: Answered) -> float:
        try:
            return float(self._pattern.fullmatch(answered.answer, timeout=_SECONDS) is not None)
        except TimeoutError:
            return 0.0
