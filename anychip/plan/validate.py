"""How far the planner is from measured runs, beside the one line that any planner must beat.

The baseline is a constant half of the chip's peak and the textbook bubble: no parameter fitted, no network, no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anychip.errors import InputError
from anychip.plan.calibrate import Sample, chip_family, facts_of, predict_runs
from anychip.plan.memory import allocated_bytes
from anychip.plan.predict import memory_by_rank
from anychip.plan.rows import Run, Skipped, read_files
from anychip.plan.shapes import flops_per_token, work_of
from anychip.plan.sites import shipped_sites
from anychip.plan.table import table_of
from anychip.plan.types import Floats, Site

TIE = 0.02  # layouts whose measured times differ by less are not a pair to be ordered


@dataclass(frozen=True)
class Metrics:
    """Errors are predicted / measured - 1."""

    runs: int
    mean: float  # of absolute errors
    median: float
    p90: float
    bias: float  # mean error
    pair_order: float | None  # share of pairs of layouts of one model that are put in the right order
    regret: float | None  # how much slower the layout chosen is than the best measured one, mean over groups
    groups: int  # groups of layouts behind the last two

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Row:
    run: Run
    site: str
    predicted_seconds: float | None
    baseline_seconds: float | None
    predicted_memory: float | None


@dataclass(frozen=True)
class ValidationReport:
    """Every row that could be predicted, why the others were not, and the summary of both time and memory."""

    rows: list[Row]
    skipped: list[Skipped]
    time: dict[str, Metrics] = field(default_factory=dict)  # all, and by source and software
    baseline: dict[str, Metrics] = field(default_factory=dict)
    memory: dict[str, Metrics] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The report as plain values, for `--json`."""
        return {
            "time": {name: metrics.as_json() for name, metrics in self.time.items()},
            "baseline": {name: metrics.as_json() for name, metrics in self.baseline.items()},
            "memory": {name: metrics.as_json() for name, metrics in self.memory.items()},
            "rows": [_row_json(row) for row in self.rows],
            "skipped": [{"id": one.id, "reason": one.reason} for one in self.skipped],
        }


def _row_json(row: Row) -> dict[str, Any]:
    run = row.run
    error = None if row.predicted_seconds is None or not run.seconds else row.predicted_seconds / run.seconds - 1
    return {
        "id": run.id,
        "source": run.source,
        "software": run.software,
        "chip": run.chip,
        "layout": str(run.layout),
        "site": row.site,
        "measured_seconds": run.seconds,
        "predicted_seconds": row.predicted_seconds,
        "baseline_seconds": row.baseline_seconds,
        "error": error,
        "measured_memory_bytes": run.memory_bytes,
        "predicted_memory_bytes": row.predicted_memory,
        "assumed": list(run.assumed),
    }


def validate(paths: Path | Sequence[Path], site: Site | None = None) -> ValidationReport:
    """Predict every row of the files that is complete enough.

    Without a site, each row is predicted with the shipped one of its chip and software. Raises InputError when a file
    lacks columns or no row can be predicted.
    """
    runs, skipped = read_files([paths] if isinstance(paths, Path) else paths)
    return validate_runs(runs, skipped, site)


def default_site_of(run: Run) -> Site:
    """The shipped site of a run's chip, software and network."""
    return shipped_sites().site_for(run)


def validate_runs(runs: Sequence[Run], skipped: Sequence[Skipped], site: Site | None = None) -> ValidationReport:
    """As `validate`, for runs that were read already."""

    def site_for(run: Run) -> Site:
        return site or default_site_of(run)

    timed = [run for run in runs if run.seconds]
    seconds = dict(zip(map(id, timed), predict_runs(timed, site_for), strict=True)) if timed else {}
    unknown = {id(run) for run in timed if not np.isfinite(seconds[id(run)])}
    skipped = [
        *skipped,
        *(
            Skipped(run.id, f"neither the catalogue nor the site {site_for(run).name} knows the peak of {run.chip}")
            for run in timed
            if id(run) in unknown
        ),
    ]
    runs = [run for run in runs if id(run) not in unknown]
    if not runs:
        raise InputError("no row can be predicted.", do=f"The first reason: {skipped[0].reason}.")
    rows = [
        Row(
            run=run,
            site=site_for(run).name,
            predicted_seconds=float(seconds[id(run)]) if id(run) in seconds else None,
            baseline_seconds=baseline_seconds(run, site_for(run)) if run.seconds else None,
            predicted_memory=predicted_memory(run, facts_of(run, site)) if run.memory_bytes else None,
        )
        for run in runs
    ]
    labels = {"all": lambda _: True} | {
        name: (lambda run, name=name: name == _label(run)) for name in dict.fromkeys(_label(run) for run in runs)
    }
    with_time = [row for row in rows if row.predicted_seconds is not None]
    with_memory = [row for row in rows if row.predicted_memory is not None]
    return ValidationReport(
        rows=rows,
        skipped=list(skipped),
        time=_by_label(with_time, labels, lambda row: row.predicted_seconds, lambda row: row.run.seconds),
        baseline=_by_label(with_time, labels, lambda row: row.baseline_seconds, lambda row: row.run.seconds),
        memory=_by_label(with_memory, labels, lambda row: row.predicted_memory, lambda row: row.run.memory_bytes),
    )


def _label(run: Run) -> str:
    return f"{run.publisher} on {chip_family(run.chip)}, {run.software}"


def _by_label(
    rows: Sequence[Row], labels: dict[str, Callable[[Run], bool]], predicted: Any, measured: Any
) -> dict[str, Metrics]:
    found: dict[str, Metrics] = {}
    for name, belongs in labels.items():
        chosen = [row for row in rows if belongs(row.run)]
        if chosen:
            found[name] = metrics(
                np.array([predicted(row) for row in chosen]),
                np.array([measured(row) for row in chosen]),
                [row.run.group for row in chosen],
            )
    return found


def metrics(predicted: Floats, measured: Floats, groups: Sequence[str]) -> Metrics:
    """Errors, and how well layouts of one model are ordered; `groups` names what each row is compared with."""
    error = predicted / measured - 1
    absolute = np.abs(error)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    right = total = 0
    regrets: list[float] = []
    for chosen in members.values():
        y, p = measured[chosen], predicted[chosen]
        apart = [(a, b) for a in range(len(y)) for b in range(a) if abs(y[a] - y[b]) > TIE * min(y[a], y[b])]
        total += len(apart)
        right += sum((y[a] < y[b]) == (p[a] < p[b]) for a, b in apart)
        if apart:
            regrets.append(float(y[int(p.argmin())] / y.min() - 1))
    return Metrics(
        runs=len(error),
        mean=float(absolute.mean()),
        median=float(np.median(absolute)),
        p90=float(np.quantile(absolute, 0.9)),
        bias=float(error.mean()),
        pair_order=right / total if total else None,
        regret=float(np.mean(regrets)) if regrets else None,
        groups=len(regrets),
    )


def baseline_seconds(run: Run, site: Site | None = None) -> float:
    """Half the peak, recomputation counted, attention in full, and 1 + (p - 1) / (v m) for the bubble.

    A peak that `site` has measured comes before the catalogue's.
    """
    sample = Sample.of([run])
    peak = site.peak_tflops * 1e12 if site and site.peak_tflops else float(sample.hardware.half_peak[0])
    w, layout = work_of(run.workload), run.layout
    flops = float(flops_per_token(w, halve_attention=False)) * run.workload.tokens
    flops *= 4 / 3 if layout.recompute == "full" else 1.0
    bubble = 1 + (layout.pp - 1) / (layout.vpp * layout.micro_batches(run.workload))
    return flops / (0.5 * peak * run.devices) * bubble


def predicted_memory(run: Run, site: Site) -> float:
    """Bytes on the fullest rank, as the source counts them: what tensors take, or everything in use.

    Of `site` only what it says of memory counts; by default that is the software's, see `calibrate.BASES`.
    """
    w = work_of(run.workload)
    terms = memory_by_rank(w, table_of([run.layout], w.layers), run.layout, site)
    every = allocated_bytes(terms) if run.memory_kind == "allocated" else np.asarray(sum(terms.values()))
    return float(every.max())
