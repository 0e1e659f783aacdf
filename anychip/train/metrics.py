"""What a run says about itself: one line a step, its JSONL twin, TensorBoard."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    experts: Mapping[str, float] = field(default_factory=dict)  # how evenly they are used; see train/balance.py
    measured: Mapping[str, float] = field(default_factory=dict)  # about what the model wrote for this step

    def line(self, steps: int) -> str:
        parts = [
            f"step {self.step}/{steps}",
            f"loss {self.loss:.3f}",
            f"grad_norm {self.grad_norm:.2f}",
            f"lr {self.lr:.1e}",
            *(f"{name} {value:.4g}" for name, value in self.measured.items()),
            f"mem {self.memory_bytes / 2**30:.1f}GiB",
            f"tok/s/dev {self.tokens_per_second:,.0f}",
            f"TFLOP/s/dev {self.tflops:.2f}",
        ]
        if self.mfu is not None:
            parts.append(f"mfu {self.mfu:.1%}")
        if "expert_load_max" in self.experts:
            parts.append(f"busiest expert {self.experts['expert_load_max']:.2f}x")
        parts.append(f"data {self.data_share:.1%}")
        if self.predicted is not None:
            parts.append(f"predicted {self.predicted:,.0f}")
        return " | ".join([*parts, f"eta {_duration(self.eta_seconds)}"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard. Opened at `step`, it forgets what an interrupted run logged later.

    While the disk fails, rows are kept in memory: a full disk does not stop training. `catch_up`, called every step,
    writes them when it is back, before a state that is saved later can outlive them.
    """

    def __init__(self, directory: Path, tensorboard: Path | None, step: int) -> None:
        self.path = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self._waiting: list[str] = []
        self._open(step)
        self._board: Any = None
        if tensorboard is not None:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            from tensorboard.summary import Writer

            self._board = Writer(str(tensorboard))

    def write(self, values: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(values) + "\n")
        try:
            self._append()
        except OSError as error:
            if len(self._waiting) == 1:
                said = f"warning: {self.path} cannot be written ({error.strerror}); training goes on, rows are kept"
                print(said, file=sys.stderr, flush=True)
        try:
            self._draw(values)
        except OSError as error:
            print(f"warning: no more TensorBoard files ({error.strerror})", file=sys.stderr, flush=True)
            self._board = None

    def write_step(self, metrics: StepMetrics) -> None:
        row = asdict(metrics)
        further = row.pop("experts") | row.pop("measured")
        self.write(row | further)

    def catch_up(self) -> None:
        """Write the rows that wait for room, if there is room now."""
        if self._waiting:
            with suppress(OSError):
                self._append()

    def forget_after(self, step: int) -> None:
        """Training went back to `step`: drop the rows of what it undid."""
        self._append()
        self._file.close()
        self._open(step)

    def close(self) -> None:
        """Raises OSError when rows are left that the disk does not take."""
        self._append()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _open(self, step: int) -> None:
        _keep_until(self.path, step)
        self._file = self.path.open("ab", buffering=0)
        self._end = self._file.tell()

    def _append(self) -> None:
        """Write what is waiting, behind the last whole row."""
        rows = "".join(self._waiting).encode()
        self._file.truncate(self._end)  # a full disk may have taken half a row
        written = self._file.write(rows) if rows else 0
        if written != len(rows):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += written
        self._waiting.clear()

    def _draw(self, values: Mapping[str, Any]) -> None:
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, values["step"])


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
