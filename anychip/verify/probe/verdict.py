"""From findings to a verdict: fit, fit with fall-backs, or unfit and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from anychip.verify.probe.measure import FLUSHES, NOT_REPEATABLE, Finding

Fitness = Literal["fit", "fit with fall-backs", "unfit"]


@dataclass(frozen=True)
class Verdict:
    """`fallbacks`: operators that the vendor computes wrong and PyTorch right, with what is wrong. `reasons`: what
    makes the chip unfit. `notes`: what a user should know and training survives."""

    fitness: Fitness
    fallbacks: dict[str, str]
    reasons: list[str]
    notes: list[str]


def judge_chip(findings: Iterable[Finding], canary_problem: str, *, deterministic: bool) -> Verdict:
    """A vendor's operator with any flaw is replaced; what nothing can replace must be right. Other bits from run to run
    and lost subnormal numbers are borne, unless the recipe asks for determinism."""
    fallbacks: dict[str, str] = {}
    reasons: list[str] = []
    notes: list[str] = []
    for finding in findings:
        if finding.version == "vendor":
            fallbacks.setdefault(finding.operator, finding.describe())
        elif finding.kind == FLUSHES or (finding.kind == NOT_REPEATABLE and not deterministic):
            notes.append(finding.describe())
        else:
            reasons.append(finding.describe())
    if canary_problem:
        reasons.append(f"canary: {canary_problem}")
    fitness: Fitness = "unfit" if reasons else "fit with fall-backs" if fallbacks else "fit"
    return Verdict(fitness, fallbacks, reasons, notes)
