"""Found on PYTHONPATH by processes that a test trains with. In the first generation pieces of the phase that SLOW_PHASE
names take SLOW seconds each, and a process does not come back from its sixth one while there is a file STUCK/rank-N."""

from __future__ import annotations

import os
import time
from itertools import count
from pathlib import Path
from typing import Any


def _slow(owner: Any, name: str, seconds: float, stuck: Path) -> None:
    function, number = getattr(owner, name), count(1)

    def slow(*inputs: Any, **named: Any) -> Any:
        time.sleep(seconds)
        if next(number) > 5:
            while stuck.exists():
                time.sleep(0.02)
        return function(*inputs, **named)

    setattr(owner, name, slow)


if "SLOW_PHASE" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "1":
    from anychip.grow.source import CheckpointRows
    from anychip.train.checkpoint.shard import ShardWriter
    from anychip.train.engine import Engine

    pieces = {"evaluate": (Engine, "score"), "store": (ShardWriter, "add"), "grow": (CheckpointRows, "rows")}
    stuck = Path(os.environ["STUCK"]) / f"rank-{os.environ['RANK']}"
    _slow(*pieces[os.environ["SLOW_PHASE"]], float(os.environ["SLOW"]), stuck)
