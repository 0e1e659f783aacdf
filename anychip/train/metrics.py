"""What a run says about itself: one line a step, its JSONL twin, TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from anychip.files import atomic_writer


@dataclass(frozen=True)
class StepMetrics:
    """One logged step. `tokens` counts whole sequences up to this step; rates are per device and of the tokens really
    computed since the last line; `mfu` is None when no peak is known."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    memory_bytes: int
    tokens_per_second: float
    tflops: float
    mfu: float | None
    data_share: float
    seconds: float
    eta_seconds: float
    predicted: float | None = None  # tokens a second and device that a plan foresaw

    def line(self, steps: int) -> str:
        parts = [
            f"step {self.step}/{steps}",
            f"loss {self.loss:.3f}",
            f"grad_norm {self.grad_norm:.2f}",
            f"lr {self.lr:.1e}",
            f"mem {self.memory_bytes / 2**30:.1f}GiB",
            f"tok/s/dev {self.tokens_per_second:,.0f}",
            f"TFLOP/s/dev {self.tflops:.2f}",
        ]
        if self.mfu is not None:
            parts.append(f"mfu {self.mfu:.1%}")
        parts.append(f"data {self.data_share:.1%}")
        if self.predicted is not None:
            parts.append(f"predicted {self.predicted:,.0f}")
        return " | ".join([*parts, f"eta {_duration(self.eta_seconds)}"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard. Opened at `step`, it forgets what an interrupted run logged later."""

    def __init__(self, directory: Path, tensorboard: Path | None, step: int) -> None:
        self.path = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        _keep_until(self.path, step)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard is not None:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            from tensorboard.summary import Writer

            self._board = Writer(str(tensorboard))

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, values["step"])

    def write_step(self, metrics: StepMetrics) -> None:
        self.write(asdict(metrics))

    def forget_after(self, step: int) -> None:
        """Training went back to `step`: drop the rows of what it undid."""
        self._file.close()
        _keep_until(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop rows after `step`, and a torn last row."""
    if not path.is_file():
        return
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                rows.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_writer(path, "w") as handle:
        handle.writelines(row + "\n" for row in rows)
