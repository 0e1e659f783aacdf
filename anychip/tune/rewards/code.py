"""Does the program in the answer pass its tests?"""

from __future__ import annotations

import sys

from anychip.sandbox import Limits, isolation, program_in, run_python
from anychip.tune.rewards.reward import Answered


class Code:
    """1 where the answer's program, and its tests behind it, run to the last line inside the sandbox, else 0. The
    program is the last fenced block, or the whole answer where there is none. 0 without tests."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        if isolation() == "none":
            print(
                "warning: this system lets no process be cut off from network and files; programs in answers run with "
                "limits of time and memory alone",
                file=sys.stderr,
            )

    def __call__(self, answered: Answered) -> float:
        if not answered.tests.strip():
            return 0.0
        return float(run_python(f"{program_in(answered.answer)}\n{answered.tests}", self._limits).passed)
