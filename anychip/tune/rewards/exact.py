"""Is it the known answer, word for word?"""

from __future__ import annotations

from anychip.tune.rewards.reward import Answered


def exact(answered: Answered) -> float:
    """1 for the reference, spaces at the ends aside, else 0; 0 without a reference."""
    return float(bool(answered.reference) and answered.answer.strip() == answered.reference.strip())
