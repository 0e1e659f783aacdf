"""A trace as a file: one JSON line that says what it is of, then a line for each step.

    {"anychip_trace": 1, "recipe": ..., "chip": ..., "dtype": ..., ...}
    {"step": 1, "loss": 5.9, "grad_norm": 1.2}                                every step
    {"step": 1, "scalars": {...}, "tensors": {KIND: {NAME: [count, sum, squares, nonfinite, SKETCH]}}}    traced ones

SKETCH is base64 of 256 little-endian float32 numbers (sketch.py); entries stand in the order of the step. A trace that
reached its size limit goes on with losses alone and says so.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from anychip.errors import InputError
from anychip.verify.names import KINDS, Kind

VERSION = 1
_SKETCH_NUMBERS = 256
_MOST_BYTES_A_LINE, _MOST_STEPS, _MOST_TENSORS = 1 << 28, 10_000_000, 200_000
_FULL = {"stopped": "the trace reached its size limit; losses follow"}


@dataclass(frozen=True)
class Sketch:
    """What is known of a tensor. `sketch` is None where only these numbers are (a dump by other tools); then `largest`
    and `smallest` may be known."""

    count: float
    total: float
    squares: float
    nonfinite: float
    sketch: np.ndarray | None
    largest: float | None = None
    smallest: float | None = None

    @classmethod
    def of(cls, summary: Any) -> Sketch:
        """From sketch.summarize's [260], summed over parts."""
        count, total, squares, nonfinite, *sketch = summary.tolist()
        return cls(count, total, squares, nonfinite, np.asarray(sketch, dtype=np.float32))

    @property
    def norm(self) -> float:
        return math.sqrt(max(self.squares, 0.0))


@dataclass
class TracedStep:
    step: int
    tensors: dict[tuple[Kind, str], Sketch]
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass
class Trace:
    """`losses` and `grad_norms` by step; `steps` are those whose tensors were traced."""

    source: str
    header: dict[str, Any]
    losses: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    steps: dict[int, TracedStep] = field(default_factory=dict)

    @property
    def unit(self) -> float:
        """Half a unit in the last place of the dtype that products ran in."""
        return {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11}.get(
            str(self.header.get("dtype")), 2.0**-8
        )


class TraceWriter:
    """Writes lines as they come, so that a run that is killed leaves what it has traced."""

    def __init__(self, path: Path, header: dict[str, Any], max_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = path.open("w", encoding="utf-8")
        self._left = max_bytes
        self._write({"anychip_trace": VERSION, **header})

    def write_loss(self, step: int, loss: float, grad_norm: float) -> None:
        self._write({"step": step, "loss": loss, "grad_norm": grad_norm})

    def write_step(self, traced: TracedStep) -> None:
        tensors: dict[str, dict[str, list[Any]]] = {kind: {} for kind in KINDS}
        for (kind, name), entry in traced.tensors.items():
            assert entry.sketch is not None
            packed = base64.b64encode(entry.sketch.astype("<f4").tobytes()).decode()
            tensors[kind][name] = [entry.count, entry.total, entry.squares, entry.nonfinite, packed]
        line = json.dumps({"step": traced.step, "scalars": traced.scalars, "tensors": tensors})
        if len(line) > self._left:
            if self._left > 0:
                self._write(_FULL)
            self._left = 0
            return
        self._left -= len(line)
        self._handle.write(line + "\n")
        self._handle.flush()

    def _write(self, value: dict[str, Any]) -> None:
        self._handle.write(json.dumps(value) + "\n")
        self._handle.flush()


def read_trace(path: Path) -> Trace:
    """Read a trace. The last line may be half written. Raises InputError for anything else that is not one."""
    trace: Trace | None = None
    for number, (line, is_whole) in enumerate(_lines(path), start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("is no object")
            if trace is None:
                trace = Trace(str(path), _header(value))
            else:
                _take(trace, value)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if not is_whole and trace is not None:
                break
            _refuse(path, number, error)
    if trace is None:
        raise InputError("is empty.", where=path, do="Give a file that `anychip verify trace` wrote.")
    return trace


def _lines(path: Path) -> Iterator[tuple[str, bool]]:
    """Lines, each with whether it ends with a line feed."""
    try:
        with path.open("rb") as handle:
            while line := handle.readline(_MOST_BYTES_A_LINE):
                yield line.decode("utf-8", errors="replace"), line.endswith(b"\n")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}).", where=path, do="Give a trace.") from None


def _refuse(path: Path, line: int, error: Exception) -> NoReturn:
    raise InputError(
        f"line {line} is not of a trace ({type(error).__name__}: {str(error)[:120]}).",
        where=path,
        do="Give a file that `anychip verify trace` wrote, whole and unchanged.",
    ) from None


def _header(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("anychip_trace") != VERSION:
        raise ValueError(f"it is not a trace of version {VERSION}")
    return {key: item for key, item in value.items() if key != "anychip_trace"}


def _take(trace: Trace, value: dict[str, Any]) -> None:
    if "stopped" in value:
        return
    step = value["step"]
    if not isinstance(step, int) or isinstance(step, bool) or not 0 < step <= _MOST_STEPS:
        raise ValueError("step is no step")
    if "tensors" in value:
        scalars = {str(name): _number(number) for name, number in value["scalars"].items()}
        trace.steps[step] = TracedStep(step, _tensors(value["tensors"]), scalars)
    else:
        trace.losses[step] = _number(value["loss"])
        trace.grad_norms[step] = _number(value["grad_norm"])


def _tensors(value: dict[str, Any]) -> dict[tuple[Kind, str], Sketch]:
    if set(value) - set(KINDS) or sum(map(len, value.values())) > _MOST_TENSORS:
        raise ValueError("tensors are of no known kind, or too many")
    return {(kind, name): _sketch(entry) for kind in KINDS for name, entry in value.get(kind, {}).items()}


def _sketch(entry: list[Any]) -> Sketch:
    *numbers, packed = entry
    count, total, squares, nonfinite = map(_number, numbers)
    sketch = np.frombuffer(base64.b64decode(packed, validate=True), dtype="<f4")
    if len(sketch) != _SKETCH_NUMBERS:
        raise ValueError(f"a sketch has {len(sketch)} numbers")
    if min(count, squares, nonfinite) < 0:
        raise ValueError("a count is negative")
    return Sketch(count, total, squares, nonfinite, sketch.astype(np.float32))


def _number(value: Any) -> float:
    """JSON's numbers, and the NaN and Infinity that Python writes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return float(value)
