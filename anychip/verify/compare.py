"""Two traces side by side: the first tensor that departs farther than rounding explains, and in which direction.

Tensors are visited in the order in which a step computes them: weights, forward pass, loss, backward pass, gradients'
norms, updates. What each is computed from was visited before it, so errors are judged by how they grow. A result may be

    floor + growth x (largest error of what was visited before it in this step)

off, in shares of its norm, where the floor is 16 u of the less precise dtype and 2^-21, which the sketches themselves
are off by; growth is 8, or 64 for gradients of queries and keys, which are differences of nearly equal numbers. A step
of Adam turns small gradients into large updates: an update whose gradient is off by e may be off by 4 sqrt(e) besides,
because that is what some elements' changed signs amount to. The first tensor over its limit is where the runs part;
what follows only inherits it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anychip.errors import InputError
from anychip.verify.curves import CurveVerdict, compare_curves
from anychip.verify.msprobe import is_msprobe_dump, read_msprobe
from anychip.verify.names import KINDS, Kind
from anychip.verify.trace import Sketch, Trace, TracedStep, read_trace

Direction = Literal["start", "forward", "backward", "update"]
Outcome = Literal["equal", "rounding", "bug"]
_FLOOR, _GROWTH, _GROWTH_OF_SCORES = 16.0, 8.0, 64.0
_SKETCHING = 2.0**-21
_SIGNS, _DECAY_DEVIATIONS, _DECAY_FLOOR = 4.0, 12.0, 2e-3
_LIST = 12


@dataclass(frozen=True)
class Departure:
    """A tensor (or number) over its limit. `after` is the last one before it that agrees, in the same direction."""

    step: int
    direction: Direction
    name: str
    what: str
    error: float
    limit: float
    after: str

    def describe(self) -> str:
        behind = f", after {self.after}, which agrees" if self.after else ""
        return (
            f"step {self.step}, {self.direction}: {self.what} of {self.name} is off by {self.error:.2g} of its norm, "
            f"{self.limit:.2g} allowed{behind}"
        )


@dataclass(frozen=True)
class Comparison:
    """`worst` lists the largest errors as shares of what was allowed: (how many times, what)."""

    first: str
    second: str
    outcome: Outcome
    steps: list[int]
    compared: int
    only_in_one: list[str]
    departure: Departure | None
    curve: CurveVerdict
    worst: list[tuple[float, str]] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        return self.outcome != "bug" and not self.curve.diverged

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passes": self.passes}

    def as_text(self) -> str:
        verdict = {
            "equal": "no difference at all",
            "rounding": "differences of the size that rounding makes",
            "bug": "more than rounding",
        }[self.outcome]
        steps = ", ".join(map(str, self.steps[:8])) + (" ..." if len(self.steps) > 8 else "")
        lines = [f"{self.first} and {self.second}: {verdict}"]
        lines.append(f"  {self.compared:,} tensors compared, of steps {steps or 'none'}")
        if self.departure is not None:
            lines.append(f"  first departure: {self.departure.describe()}")
        if self.only_in_one:
            more = f" and {len(self.only_in_one) - _LIST} more" if len(self.only_in_one) > _LIST else ""
            lines.append(f"  only in one of them: {', '.join(self.only_in_one[:_LIST])}{more}")
        lines.append(f"  {self.curve.describe()}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Visit:
    """One thing to compare: a tensor of both traces, or a number."""

    direction: Direction
    kind: Kind | Literal["number"]
    name: str


def read_either(path: Path) -> Trace:
    """A trace of ours, or a dump of msprobe."""
    return read_msprobe(path) if is_msprobe_dump(path) else read_trace(path)


def compare(first: Trace, second: Trace, *, false_alarms: float = 0.01, tolerance: float = 0.001) -> Comparison:
    """Compare what both hold. Raises InputError when they have nothing in common."""
    steps = sorted(set(first.steps) & set(second.steps))
    curve = compare_curves(first.losses, second.losses, false_alarms=false_alarms, tolerance=tolerance)
    if not steps and not curve.judged:
        raise InputError(
            "have no traced step in common, and too few losses.",
            where=f"{first.source} and {second.source}",
            do="Trace both at the same steps (--interval), from the same recipe.",
        )
    judge = _Judge(max(first.unit, second.unit))
    alone: dict[str, None] = {}
    departure = None
    for step in steps:
        one, other = first.steps[step], second.steps[step]
        alone.update(dict.fromkeys(_unshared(one, other)))
        departure = judge.step(one, other)
        if departure is not None:
            break
    outcome: Outcome = "bug" if departure else "rounding" if judge.largest > 0 else "equal"
    worst = sorted(judge.shares, reverse=True)[:_LIST]
    return Comparison(first.source, second.source, outcome, steps, judge.compared, list(alone), departure, curve, worst)


def _unshared(one: TracedStep, other: TracedStep) -> Iterator[str]:
    for kind, name in one.tensors.keys() ^ other.tensors.keys():
        yield f"{kind} {name}"


def _order(one: TracedStep, other: TracedStep) -> Iterator[_Visit]:
    """What both hold, in the order in which a step computes it; entries of a kind stand in forward order."""
    of_kind = {kind: list(_held(kind, one, other)) for kind in KINDS}
    yield from (_Visit("start", "parameter", name) for name in of_kind["parameter"])
    yield from (_Visit("forward", "activation", name) for name in of_kind["activation"])
    yield _Visit("forward", "number", "loss")
    yield from _backward(of_kind["gradient"], of_kind["parameter_gradient"])
    yield _Visit("backward", "number", "grad_norm")
    yield _Visit("update", "number", "applied_grad_norm")
    yield _Visit("update", "number", "lr")
    yield from (_Visit("update", "update", name) for name in of_kind["update"])
    yield _Visit("update", "number", "decay")


def _held(kind: Kind, one: TracedStep, other: TracedStep) -> Iterator[str]:
    """Names of a kind that both hold; a gradient or update also when one lacks it that has the tensor itself."""
    owner = _OWNERS.get(kind)
    for k, name in {**one.tensors, **other.tensors}:
        in_both = (k, name) in one.tensors and (k, name) in other.tensors
        if k == kind and (in_both or (owner and (owner, name) in one.tensors and (owner, name) in other.tensors)):
            yield name


_OWNERS: dict[Kind, Kind] = {"gradient": "activation", "parameter_gradient": "parameter", "update": "parameter"}


def _backward(outputs: list[str], parameters: list[str]) -> Iterator[_Visit]:
    """Gradients of outputs from the last to the first, and behind each those of the parameters that made it."""
    left = dict.fromkeys(reversed(parameters))
    known = set(outputs)
    for name in [name for name in left if name.rpartition(".")[0] not in known and "embed" not in name]:
        del left[name]  # of the head, whose output is the loss
        yield _Visit("backward", "parameter_gradient", name)
    for output in reversed(outputs):
        yield _Visit("backward", "gradient", output)
        for name in [name for name in left if name.rpartition(".")[0] == output]:
            del left[name]
            yield _Visit("backward", "parameter_gradient", name)
    yield from (_Visit("backward", "parameter_gradient", name) for name in left)


class _Judge:
    """Walks through steps; what it has seen of a step decides how far the next tensor may be off."""

    def __init__(self, unit: float) -> None:
        self._unit = unit
        self.largest = 0.0
        self.compared = 0
        self.shares: list[tuple[float, str]] = []

    def step(self, one: TracedStep, other: TracedStep) -> Departure | None:
        seen, gradients, after = 0.0, 0.0, {"start": "", "forward": "", "backward": "", "update": ""}
        for visit in _order(one, other):
            error, what = self._error(visit, one, other)
            if error is None:
                continue
            limit = self._limit(visit, seen, gradients, one, other)
            self.compared += 1
            self.largest = max(self.largest, error)
            self.shares.append((error / limit, f"step {one.step}, {visit.direction}: {visit.name}"))
            if not error <= limit:
                return Departure(one.step, visit.direction, visit.name, what, error, limit, after[visit.direction])
            if visit.kind != "update" and visit.name != "decay":
                seen = max(seen, error)
            if visit.kind == "parameter_gradient":
                gradients = max(gradients, error)
            if visit.kind != "number":
                after[visit.direction] = visit.name
        return None

    def _limit(self, visit: _Visit, seen: float, gradients: float, one: TracedStep, other: TracedStep) -> float:
        if visit.name == "lr":
            return 1e-9
        if visit.name == "decay":
            return self._decay_limit(gradients, one, other)
        scores = visit.kind == "gradient" and visit.name.endswith(("rotated_q", "rotated_k"))
        limit = _FLOOR * self._unit + _SKETCHING + (_GROWTH_OF_SCORES if scores else _GROWTH) * seen
        if visit.kind == "update":
            limit += _SIGNS * math.sqrt(max(gradients, self._unit))
        if visit.kind == "parameter" and one.step > 1:
            limit = math.inf  # paths part; how far is what the rest of the step starts from
        return limit

    def _decay_limit(self, gradients: float, one: TracedStep, other: TracedStep) -> float:
        """How far apart two estimates of the weight decay lie when signs of small gradients differ at random."""
        sizes = [step.scalars.get("decay_size", 0.0) for step in (one, other)]
        elements = sum(s.count for (kind, _), s in one.tensors.items() if kind == "parameter")
        if min(sizes) <= 0 or elements <= 0:
            return math.inf
        return _DECAY_FLOOR + _DECAY_DEVIATIONS * math.sqrt(max(gradients, self._unit) / min(sizes))

    def _error(self, visit: _Visit, one: TracedStep, other: TracedStep) -> tuple[float | None, str]:
        """How far two things lie apart, as a share of the larger, and what of them that is."""
        if visit.kind == "number":
            a, b = one.scalars.get(visit.name), other.scalars.get(visit.name)
            if a is None or b is None:
                return None, ""
            if visit.name == "decay":
                return _not_finite_is_all(abs(a - b)), "the strength"
            return _not_finite_is_all(abs(a - b) / max(abs(a), abs(b), 1e-300)), "the value"
        key = (visit.kind, visit.name)
        if key not in one.tensors or key not in other.tensors:
            return math.inf, f"only one of them has {_WORDS[visit.kind]}: that"
        return distance(one.tensors[key], other.tensors[key], _WORDS[visit.kind])


_WORDS = {
    "parameter": "the weight",
    "activation": "the output",
    "gradient": "the gradient of the output",
    "parameter_gradient": "the gradient",
    "update": "the update",
}


def distance(one: Sketch, other: Sketch, word: str) -> tuple[float, str]:
    """How far two tensors lie apart as a share of the larger norm, and in words what differs."""
    if one.count != other.count:
        return math.inf, f"the number of elements ({one.count:,.0f} and {other.count:,.0f})"
    if one.nonfinite != other.nonfinite:
        return math.inf, f"the number of infinities and NaN ({one.nonfinite:,.0f} and {other.nonfinite:,.0f})"
    size = max(one.norm, other.norm)
    if size == 0.0:
        return 0.0, word
    apart = abs(one.norm - other.norm)
    if one.sketch is not None and other.sketch is not None:
        apart = max(apart, float(np.linalg.norm(one.sketch.astype(np.float64) - other.sketch.astype(np.float64))))
    else:  # the means' difference, as a norm
        apart = max(apart, abs(one.total - other.total) / math.sqrt(max(one.count, 1.0)))
    return _not_finite_is_all(apart / size), word


def _not_finite_is_all(error: float) -> float:
    return error if math.isfinite(error) else math.inf
