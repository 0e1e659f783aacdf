"""Fitting a site's scalars to measured runs.

The scalars are few and each has a place where it must lie, so the fit is a maximum a posteriori one: residuals of
log(time) with a robust loss, and a pull towards the prior that small samples cannot overrule. Sites form a tree: all
modern software on all chips, one family of chips, one software on that family; each level is the next one's prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anychip.errors import InputError
from anychip.plan.cost import step_terms
from anychip.plan.machine import machine_of_chip
from anychip.plan.rows import Run, Skipped, Software
from anychip.plan.shapes import Work, work_of
from anychip.plan.table import Hardware, Table, hardware_of, table_of
from anychip.plan.types import Floats, Machine, Site, eight_of_ten

FACTS = (
    "fused_attention", "causal_skip", "fused_pointwise", "dropout", "loss_bytes", "reduce_bytes", "gradient_bytes",
    "routes_by_node",
)  # fmt: skip
NOISE = 0.15  # spread of log(time) between runs of one configuration
SOURCE_SPREAD = 0.05  # of what a source's runs have in common
ROBUST = 0.10  # residuals beyond this count linearly, not by their square


@dataclass(frozen=True)
class Knob:
    """A scalar that may be fitted: its range, the scale it moves on, and how far the prior lets it go."""

    name: str
    low: float
    high: float
    logarithmic: bool = False
    width: float = 0.5

    def encode(self, value: float) -> float:
        """To an unbounded scale on which the prior is a normal one."""
        share = np.log(value / self.low) / np.log(self.high / self.low) if self.logarithmic else 0.0
        share = share or (value - self.low) / (self.high - self.low)
        share = min(max(share, 1e-3), 1 - 1e-3)
        return float(np.log(share / (1 - share)))

    def decode(self, position: float) -> float:
        share = 1.0 / (1.0 + np.exp(-position))
        if self.logarithmic:
            return float(self.low * (self.high / self.low) ** share)
        return float(self.low + share * (self.high - self.low))


KNOBS = {
    knob.name: knob
    for knob in (
        Knob("matmul_efficiency", 0.2, 1.0),
        Knob("matmul_half_area", 1e4, 2e7, logarithmic=True, width=0.25),
        Knob("low_precision_efficiency", 0.2, 1.0),
        Knob("attention_efficiency", 0.05, 0.95),
        Knob("memory_efficiency", 0.1, 1.0),
        Knob("intra_node_efficiency", 0.05, 1.0),
        Knob("inter_node_efficiency", 0.05, 1.0),
        Knob("tensor_overlap", 0.0, 1.0),
        Knob("expert_efficiency", 0.1, 1.0),
        Knob("layer_overhead_s", 1e-5, 5e-3, logarithmic=True, width=0.25),
    )
}
OLD_KNOBS = ("matmul_efficiency", "matmul_half_area", "memory_efficiency", "intra_node_efficiency",
             "inter_node_efficiency", "layer_overhead_s", "step_overhead_s")  # fmt: skip
KNOBS["step_overhead_s"] = Knob("step_overhead_s", 1e-4, 1.0, logarithmic=True)
_OVERHEADS = ("layer_overhead_s", "step_overhead_s")
_RATES = ("matmul_efficiency", "attention_efficiency", "memory_efficiency", "intra_node_efficiency",
          "inter_node_efficiency")  # fmt: skip
_STARTS_RUNS = 4  # runs that the spread of a calibration's start counts as
MODERN_KNOBS = tuple(name for name in KNOBS if name != "step_overhead_s")


@dataclass(frozen=True)
class Sample:
    """Runs as arrays, so that one pass of the cost model predicts them all."""

    runs: tuple[Run, ...]
    work: Work
    table: Table
    hardware: Hardware
    seconds: Floats
    facts: dict[str, Any]  # what each run's software does, [n] each: no fit changes it

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Sample:
        """Raises InputError when a run's chip is not in the catalogue."""
        twice = [*runs, runs[0]]  # arrays even for one run
        work = work_of(*[run.workload for run in twice]).take(slice(0, len(runs)))
        table = table_of([run.layout for run in runs], work.layers)
        machines = [_machine_of(run) for run in twice]
        hardware = hardware_of(machines, [run.workload.dtype for run in twice])
        cut: dict[str, Any] = {
            name: [value[:-1] for value in column] if isinstance(column, list) else column[:-1]
            for name, column in vars(hardware).items()
        }
        seconds = np.array([run.seconds if run.seconds else np.nan for run in runs])
        sites = [facts_of(run) for run in runs]
        facts = {name: np.array([getattr(site, name) for site in sites]) for name in FACTS}
        return cls(tuple(runs), work, table, Hardware(**cut), seconds, facts)

    def predict(self, site: Site) -> Floats:
        """Seconds a step, [n]; nan where neither the catalogue nor the site knows the chip's peak or bandwidth."""
        hardware = self.hardware
        if site.peak_tflops:
            peak = np.full(len(self.runs), site.peak_tflops * 1e12)
            hardware = replace(hardware, peak=peak, half_peak=peak)
        if site.memory_gb_per_s:
            hardware = replace(hardware, bandwidth=np.full(len(self.runs), site.memory_gb_per_s * 1e9))
        terms = step_terms(self.work, self.table, hardware, replace(site, **self.facts))
        return np.asarray(sum(terms.values()))


def _machine_of(run: Run) -> Machine:
    """A run's devices; what nobody has published of the chip, and only a site can know, is nan."""
    machine = machine_of_chip(
        run.chip,
        run.devices,
        devices_per_node=run.devices_per_node,
        inter_node_gbit_per_s=run.inter_node_gbit_per_s,
    )
    return replace(
        machine,
        peak_flops=machine.peak_flops or {"bf16": np.nan},
        memory_bytes_per_s=machine.memory_bytes_per_s or np.nan,
    )


def fit_site(sample: Sample, prior: Site, knobs: Sequence[str], name: str = "", weights: Floats | None = None) -> Site:
    """The site that explains the sample best without leaving the prior further than the data ask for.

    Runs of one source share what their cluster does and no knob describes; each source therefore has an offset of
    log(time), which is fitted beside the knobs and then dropped.
    Gauss-Newton with damping and numerical derivatives; robust by reweighting. At most a few dozen predictions.
    """
    chosen = [KNOBS[knob] for knob in knobs]
    start = np.array([knob.encode(getattr(prior, knob.name)) for knob in chosen])
    offsets, offset_width = _offsets(sample.runs)
    width = np.concatenate([[knob.width for knob in chosen], offset_width])
    start = np.concatenate([start, np.zeros(len(offset_width))])
    weight = np.ones(len(sample.runs)) if weights is None else weights
    target = np.log(sample.seconds)
    count = len(chosen)

    def site_at(position: Floats) -> Site:
        values = {knob.name: knob.decode(value) for knob, value in zip(chosen, position[:count], strict=True)}
        return replace(prior, **values)  # type: ignore[arg-type]

    def residuals(position: Floats) -> Floats:
        return np.asarray(np.log(sample.predict(site_at(position))) - target + offsets @ position[count:])

    def objective(position: Floats) -> float:
        r = residuals(position)
        loss = weight * ROBUST**2 * (np.sqrt(1 + (r / ROBUST) ** 2) - 1)
        return float(loss.sum() / NOISE**2 + 0.5 * (((position - start) / width) ** 2).sum())

    position, damping, current = start, 1e-2, objective(start)
    for _ in range(40):
        r = residuals(position)
        steps = np.eye(len(start))[:count] * 1e-3
        jacobian = np.concatenate(
            [np.stack([(residuals(position + step) - r) / 1e-3 for step in steps], axis=1), offsets], axis=1
        )
        w = weight / np.sqrt(1 + (r / ROBUST) ** 2) / NOISE**2
        hessian = (jacobian.T * w) @ jacobian + np.diag(1 / width**2)
        gradient = (jacobian.T * w) @ r + (position - start) / width**2
        for _attempt in range(8):
            step = np.clip(np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient), -1.5, 1.5)
            candidate = objective(position - step)
            if candidate < current:
                break
            damping *= 4
        else:
            break
        gained = current - candidate
        position, current, damping = position - step, candidate, max(damping / 3, 1e-6)
        if gained < 1e-3:
            break
    return replace(site_at(position), name=name or prior.name)


def _offsets(runs: Sequence[Run]) -> tuple[Floats, Floats]:
    """Membership of each run in its source, [n, sources], and how far each source's offset may go.

    A single source is what the site is fitted to, so it has no offset.
    """
    columns: list[Floats] = []
    widths: list[float] = []
    labels = [run.publisher for run in runs]
    names = list(dict.fromkeys(labels))
    if len(names) > 1:
        columns += [np.array([one == name for one in labels], dtype=np.float64) for name in names]
        widths += [SOURCE_SPREAD] * len(names)
    if not columns:
        return np.zeros((len(runs), 0)), np.zeros(0)
    return np.stack(columns, axis=1), np.array(widths)


# --- the tree ---------------------------------------------------------------------------------------------------

_FAMILIES = (
    ("ascend-910b", "ascend-910b"), ("ascend-910c", "ascend-910b"), ("a100", "a100"), ("a800", "a100"),
    ("h100", "h100"), ("h800", "h100"), ("h200", "h100"), ("gb200", "b200"), ("b200", "b200"), ("b300", "b200"),
    ("gb300", "b200"), ("tpu", "tpu"), ("v100", "v100"),
)  # fmt: skip


def chip_family(chip: str) -> str:
    """Chips whose cores are of one kind share what is fitted of them."""
    return next((family for prefix, family in _FAMILIES if chip.startswith(prefix)), chip)


BASES: dict[Software, Site] = {
    "megatron-2021": Site(
        name="megatron-2021", matmul_efficiency=0.8, memory_efficiency=0.8, layer_overhead_s=9e-4, step_overhead_s=5e-3,
        fused_attention=False, causal_skip=False, dropout=True, loss_bytes=50.0, reduce_bytes=2, gradient_bytes=2,
        reserved_bytes=7e9, optimizer_bytes=16.0, logits_bytes=10.0, layer_gradient_scratch=0.0,
        matmul_half_area=4e5, intra_node_efficiency=0.8, inter_node_efficiency=0.8, data_overlap=0.0,
    )
}  # fmt: skip
_MODERN = Site(
    name="modern", matmul_efficiency=0.78, matmul_half_area=4e5, attention_efficiency=0.45, memory_efficiency=0.7,
    intra_node_efficiency=0.7, inter_node_efficiency=0.7, data_overlap=0.8, tensor_overlap=0.3, layer_overhead_s=8e-4,
    step_overhead_s=0.01, expert_efficiency=0.5, low_precision_efficiency=0.8,
)  # fmt: skip
BASES |= {
    "megatron": replace(_MODERN, name="megatron", routes_by_node=True),
    "fsdp": replace(_MODERN, name="fsdp"),
    "mindspeed": replace(_MODERN, name="mindspeed", loss_bytes=50.0, gradient_bytes=2, logits_bytes=6.0),
    "mindformers": replace(_MODERN, name="mindformers", loss_bytes=50.0, reduce_bytes=2),
    "jax": replace(_MODERN, name="jax"),
    "deepspeed": replace(_MODERN, name="deepspeed", inter_node_efficiency=0.2, data_overlap=0.0),
}


def facts_of(run: Run, site: Site | None = None) -> Site:
    """The site with what one run is known to do otherwise than its software usually does."""
    return replace(site or BASES[run.software], **dict(run.facts))  # type: ignore[arg-type]


def era(software: Software) -> str:
    """Software whose unfitted facts are alike shares the upper levels of the tree."""
    return software if software in ("megatron-2021", "deepspeed") else "modern"


# Where the catalogue's peak is further from what large products reach, as vendors' own libraries show it.
_CHIP_FACTS: dict[str, dict[str, float]] = {
    "h100": {"matmul_efficiency": 0.70, "attention_efficiency": 0.38},
    "b200": {"matmul_efficiency": 0.66, "attention_efficiency": 0.40},
}


def base_site(software: Software, family: str) -> Site:
    """The prior of a software on a family of chips, before any run is seen."""
    return replace(BASES[software], **_CHIP_FACTS.get(family, {}))  # type: ignore[arg-type]


@dataclass(frozen=True)
class SiteTree:
    """Fitted sites by era, by era and chip family, and by software and chip family."""

    sites: dict[str, Site]

    def site_for(self, run: Run) -> Site:
        """The most particular site there is."""
        for key in _keys(run):
            if key in self.sites:
                return self.sites[key]
        return base_site(run.software, chip_family(run.chip))


def _keys(run: Run) -> tuple[str, str, str, str]:
    """From the leaf to the root. A network of its own kind has a leaf of its own, and its runs count in no other."""
    family, age = chip_family(run.chip), era(run.software)
    leaf = f"{family}/{run.software}"
    return f"{leaf}/{run.network}" if run.network else leaf, leaf, f"{family}/{age}/all", f"all/{age}/all"


def fit_tree(runs: Sequence[Run]) -> SiteTree:
    """Fit every level on the runs that belong to it, from the root down."""
    sites: dict[str, Site] = {}
    for level in (3, 2, 1, 0):
        groups: dict[str, list[Run]] = {}
        for run in runs:
            if level == 0 or not run.network:
                groups.setdefault(_keys(run)[level], []).append(run)
        for key, members in groups.items():
            if key in sites:
                continue
            first = members[0]
            knobs = OLD_KNOBS if era(first.software) == "megatron-2021" else MODERN_KNOBS
            above = [sites[parent] for parent in _keys(first)[level + 1 :] if parent in sites]
            base = base_site(first.software, chip_family(first.chip) if level < 3 else "")
            prior = _with_knobs(base, above[0], knobs) if above else base
            sites[key] = fit_site(Sample.of(members), prior, knobs, key, _source_weights(members))
    return SiteTree(sites)


def _with_knobs(site: Site, knobs_from: Site, knobs: Sequence[str]) -> Site:
    """A software's own facts with the scalars of the level above."""
    return replace(site, **{knob: getattr(knobs_from, knob) for knob in knobs})


def _source_weights(runs: Sequence[Run]) -> Floats:
    """Runs of a table with very many count less each, so that one sweep does not settle a chip alone."""
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.source] = counts.get(run.source, 0) + 1
    return np.array([min(1.0, (40.0 / counts[run.source]) ** 0.5) for run in runs])


def cross_validate(runs: Sequence[Run], key: Callable[[Run], Hashable]) -> Floats:
    """Seconds of each run predicted by a tree that never saw the runs of its key, [n]."""
    predicted = np.empty(len(runs))
    keys = [key(run) for run in runs]
    for held in dict.fromkeys(keys):
        tree = fit_tree([run for run, one in zip(runs, keys, strict=True) if one != held])
        chosen = [index for index, one in enumerate(keys) if one == held]
        predicted[chosen] = predict_runs([runs[index] for index in chosen], tree.site_for)
    return predicted


def predict_runs(runs: Sequence[Run], site_for: Callable[[Run], Site]) -> Floats:
    """Seconds of each run under the site chosen for it, [n]."""
    predicted = np.empty(len(runs))
    groups: dict[str, list[int]] = {}
    sites: dict[str, Site] = {}
    for index, run in enumerate(runs):
        site = site_for(run)
        sites[site.name] = site
        groups.setdefault(site.name, []).append(index)
    for name, indices in groups.items():
        predicted[indices] = Sample.of([runs[index] for index in indices]).predict(sites[name])
    return predicted


def spread(predicted: Floats, measured: Floats) -> float:
    """Standard deviation of log(measured / predicted) that a few outliers do not move: 1.48 x median deviation."""
    return float(1.4826 * np.median(np.abs(np.log(measured / predicted))))


# --- a team's own site ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """A site fitted to a team's own runs, and what it is worth on runs that it was not fitted to."""

    site: Site
    runs: int
    before: float  # mean absolute error of the site it started from
    fitted: float  # of the new site on the runs it was fitted to
    held_out: float | None  # of sites fitted without the run's model (or configuration, of one model); None of only one
    held_out_by: str
    inside: int | None  # held-out runs whose time lies inside the site's interval
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """Of predicted time: what 8 of 10 measured ones lie between, by the site's spread."""
        return eight_of_ten(1.0, self.site.relative_sigma)


def calibrate(
    runs: Sequence[Run], start: Site, name: str, skipped: Sequence[Skipped] = (), measured: Sequence[str] = ()
) -> Calibration:
    """Fit at most ten scalars of `start` to measured runs, those named in `measured` excepted.

    Raises InputError when no run has a time that the site can predict.
    """
    timed = _predictable(runs, start)
    knobs = tuple(knob for knob in knobs_for(timed) if knob not in measured)
    sample = Sample.of(timed)
    site = _fit_own(sample, start, knobs, name)
    models = {run.model for run in timed}
    by = "model" if len(models) > 1 else "configuration"
    keys: list[Hashable] = [run.model if by == "model" else _configuration(run) for run in timed]
    held = _held_out(timed, keys, start, knobs) if len(set(keys)) > 1 else None
    families = list(dict.fromkeys(chip_family(run.chip) for run in timed))
    site = replace(
        site,
        relative_sigma=_own_sigma(held, sample.seconds, start),
        source=f"fitted on {len(timed)} runs of {len(models)} models, from {start.name}",
        chip_family=families[0] if len(families) == 1 else "",
    )
    result = Calibration(
        site=site,
        runs=len(timed),
        before=_mean_error(sample.predict(start), sample.seconds),
        fitted=_mean_error(sample.predict(site), sample.seconds),
        held_out=_mean_error(held, sample.seconds) if held is not None else None,
        held_out_by=by,
        inside=None,
        skipped=tuple(skipped),
        warnings=tuple(_doubts(families, start)),
    )
    if held is None:
        return result
    low, high = result.interval
    ratio = sample.seconds / held
    return replace(result, inside=int(((low <= ratio) & (ratio <= high)).sum()))


def _predictable(runs: Sequence[Run], start: Site) -> list[Run]:
    timed = [run for run in runs if run.seconds]
    if not timed:
        raise InputError(
            "no run has a measured time.", do="Fill in step_time_s or tokens_per_s_per_device for at least one run."
        )
    known = np.isfinite(Sample.of(timed).predict(start))
    if not known.any():
        raise InputError(
            f"neither the catalogue nor the site {start.name} knows the peak of {timed[0].chip}.",
            do="Start from a site that states peak_tflops and memory_gb_per_s.",
        )
    return [run for run, one in zip(timed, known, strict=True) if one]


def _doubts(families: Sequence[str], start: Site) -> Iterator[str]:
    if len(families) > 1:
        yield f"the runs are of {' and '.join(families)}: one site for several kinds of chips; calibrate each by itself"
    elif start.chip_family and start.chip_family != families[0]:
        yield f"the runs are of {families[0]}, and the site {start.name} they start from is of {start.chip_family}"


def _fit_own(sample: Sample, start: Site, knobs: Sequence[str], name: str = "") -> Site:
    """The fit from the start moved by what all runs share.

    A cluster that is slower or faster throughout is no outlier, which is what the robust loss and the narrow prior
    around the start, made for runs of many publishers, would take it for.
    """
    share = float(np.median(sample.predict(start) / sample.seconds))
    return fit_site(sample, moved(start, share, knobs), knobs, name or start.name)


def moved(site: Site, speed: float, knobs: Sequence[str]) -> Site:
    """The site with every rate among its knobs `speed` times as high and every overhead as much shorter."""
    values = {}
    for knob in (KNOBS[name] for name in knobs if name in _RATES + _OVERHEADS):
        value = getattr(site, knob.name) * (speed if knob.name in _RATES else 1 / speed)
        values[knob.name] = min(max(value, knob.low), knob.high)
    return replace(site, **values)


def _configuration(run: Run) -> Hashable:
    """What repetitions of a run have in common: a prediction of one of them is no test where another was fitted to."""
    return replace(run.workload, name=""), run.layout, run.chip, run.devices


def _held_out(runs: Sequence[Run], keys: Sequence[Hashable], start: Site, knobs: Sequence[str]) -> Floats:
    """Seconds of each run by a site fitted without the runs of its key, [n]."""
    held = np.empty(len(runs))
    for one in dict.fromkeys(keys):
        rest = [run for run, key in zip(runs, keys, strict=True) if key != one]
        chosen = [index for index, key in enumerate(keys) if key == one]
        site = _fit_own(Sample.of(rest), start, knobs)
        held[chosen] = Sample.of([runs[index] for index in chosen]).predict(site)
    return held


def _own_sigma(held: Floats | None, measured: Floats, start: Site) -> float:
    """Spread of the held-out runs; what the start knows of it counts as a few runs more, so that two runs which happen
    to agree promise nothing."""
    if held is None:
        return start.relative_sigma
    count = len(measured)
    variance = (count * spread(held, measured) ** 2 + _STARTS_RUNS * start.relative_sigma**2) / (count + _STARTS_RUNS)
    return max(0.02, math.sqrt(variance))


def knobs_for(runs: Sequence[Run]) -> tuple[str, ...]:
    """The scalars that these runs can say something about: ten at most."""
    if all(era(run.software) == "megatron-2021" for run in runs):
        return OLD_KNOBS
    silent = set()
    if all(run.workload.dtype != "fp8" for run in runs):
        silent.add("low_precision_efficiency")
    if all(run.workload.experts is None for run in runs):
        silent.add("expert_efficiency")
    if all(run.layout.tp == 1 for run in runs):
        silent.add("tensor_overlap")
    return tuple(knob for knob in MODERN_KNOBS if knob not in silent)


def _mean_error(predicted: Floats, measured: Floats) -> float:
    return float(np.abs(predicted / measured - 1).mean())
