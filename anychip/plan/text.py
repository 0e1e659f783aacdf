"""The planner's answers as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plan.answer import PlanAnswer, days_of, nearest_rejected, rejected_counts
from anychip.plan.calibrate import Calibration
from anychip.plan.goodput import Goodput
from anychip.plan.predict import GIB
from anychip.plan.types import Machine, Prediction, Site
from anychip.plan.validate import Metrics, ValidationReport

_REASONS_SHOWN = _NEAREST_SHOWN = 5


def answer_as_text(answer: PlanAnswer) -> str:
    """The machine, the ten best layouts, the time and memory of the chosen one, what was rejected and why."""
    parts = [
        f"{answer.workload.name}: {answer.workload.tokens:,} tokens a step, {answer.total_tokens:.3g} in all\n"
        f"{answer.machine.name}: {answer.machine.devices:,} x {answer.machine.chip}, "
        f"{answer.machine.memory_bytes / GIB:.0f} GiB each; site {answer.site.name}"
        + (f"\n{answer.notes[0]}" if answer.idle_devices else "")
    ]
    if len(answer.search.best) > 1:
        parts.append(_layouts_table(answer))
    parts += [explanation(answer), goodput_text(answer.goodput)]
    if rejected := rejected_counts(answer.search):
        parts.append(_rejections(answer, rejected))
    parts += answer.notes[1:] if answer.idle_devices else answer.notes
    return "\n\n".join(parts)


def _rejections(answer: PlanAnswer, rejected: dict[str, int]) -> str:
    """How many layouts were rejected for what, and those that lack least memory."""
    shown = sorted(rejected.items(), key=lambda item: -item[1])[:_REASONS_SHOWN]
    predicted = counted(answer.search.considered, "layout")
    lines = [f"{predicted} predicted in {answer.search.seconds:.2f} s; rejected (--json lists each with its reason):"]
    lines += [f"  {count:>9,}  {reason}" for reason, count in shown]
    if left := len(rejected) - len(shown):
        lines.append(f"  and for {counted(left, 'other reason')}")
    if near := nearest_rejected(answer.search, _NEAREST_SHOWN):
        lines += ["nearest to fitting:", *(f"  {one.name}: {one.reason}" for one in near)]
    return "\n".join(lines)


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def days_text(days: float) -> str:
    """A tenth of a day, or what two figures take."""
    return f"{days:,.1f}" if days >= 1 or days == 0 else f"{days:.2g}"


def _layouts_table(answer: PlanAnswer) -> str:
    rows = [["", "layout", "step", "tok/s/dev", "mfu", "days", "GiB", "time"]]
    for number, prediction in enumerate(answer.search.best, 1):
        rows.append(
            [
                str(number),
                str(prediction.layout),
                f"{prediction.step_seconds:.2f} s",
                f"{prediction.tokens_per_second_per_device:,.0f}",
                f"{prediction.mfu:.1%}",
                days_text(days_of(prediction, answer.workload, answer.total_tokens)),
                f"{prediction.memory_bytes / GIB:.1f}",
                _shares(prediction),
            ]
        )
    return table(rows, left=(1, 7))


def _shares(prediction: Prediction) -> str:
    """The largest terms of the step as shares."""
    terms = sorted(prediction.time.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name.replace('_', ' ')} {value / prediction.step_seconds:.0%}" for name, value in terms)


def explanation(answer: PlanAnswer) -> str:
    """One layout: where its time goes, what fills its memory, how to train with it."""
    chosen = answer.chosen
    low, high = chosen.interval
    lines = [
        f"layout {chosen.layout}{_uneven(chosen)}"
        + ("" if chosen.fits else "  DOES NOT FIT: " + "; ".join(chosen.reasons)),
        f"step {chosen.step_seconds:.3g} s (8 of 10 such predictions fall in {low:.3g} to {high:.3g} s), "
        f"{chosen.tokens_per_second_per_device:,.0f} tokens/s a device, {chosen.tflops:.1f} model TFLOP/s, "
        f"mfu {chosen.mfu:.1%}, {days_text(answer.days)} days without failures",
        "",
        time_table(chosen),
        "",
        memory_table(chosen, answer.machine),
    ]
    if answer.left_out:
        lines += ["", "the search leaves this out: " + "; ".join(answer.left_out)]
    if answer.overrides:
        lines += ["", "to train with it: " + " ".join(f"--set {override}" for override in answer.overrides)]
    return "\n".join(lines)


def explained_as_text(answer: PlanAnswer) -> str:
    """One layout that was asked for, with what becomes of it where failures are given, and what was assumed."""
    failing = [goodput_text(answer.goodput)] if answer.goodput.failures else []
    return "\n\n".join([explanation(answer), *failing, *answer.notes])


def _uneven(prediction: Prediction) -> str:
    """The layers of stages as a layout is written, where they are not the even split."""
    layers = prediction.layout.stage_layers
    return " layers" + "-".join(map(str, layers)) if layers else ""


def goodput_text(found: Goodput) -> str:
    """Days with failures and what they cost; energy where it is known."""
    low, high = found.days_interval
    lines = [
        f"{days_text(found.days)} days (8 of 10 such jobs take {days_text(low)} to {days_text(high)}), "
        f"useful time {found.effective:.1%}"
    ]
    if found.failures:
        lost = ", ".join(f"{name} {share:.1%}" for name, share in found.losses.items() if share >= 5e-4)
        saves = f"a save to storage every {found.storage_interval_s / 60:.1f} min"
        if found.memory_interval_s is not None:
            saves = f"a copy to memory every {found.memory_interval_s / 60:.2f} min, " + saves
        lines.append(f"{_failures(found.failures)}; lost: {lost or 'nothing'}; best is {saves}")
    else:
        lines.append("failures are off: a cluster file's section `failures` turns them on")
    if found.energy_mwh is not None:
        lines.append(f"{found.energy_mwh:,.0f} MWh at the chips' rated power or the nodes' stated one")
    return "\n".join(lines)


def _failures(count: float) -> str:
    """Expected stops; less than one of a short job."""
    return counted(round(count), "failure") if count >= 1 else f"{count:.2g} failures"


def time_table(prediction: Prediction) -> str:
    rows = [["time", "seconds", "share"]]
    for name, seconds in sorted(prediction.time.items(), key=lambda item: -item[1]):
        if seconds > 0:
            rows.append([name.replace("_", " "), f"{seconds:.4g}", f"{seconds / prediction.step_seconds:.1%}"])
    return table(rows, left=(0,))


def memory_table(prediction: Prediction, machine: Machine) -> str:
    """GiB by term of the first, the fullest and the last stage."""
    totals = prediction.memory_by_stage
    stages = list(dict.fromkeys([0, int(totals.argmax()), len(totals) - 1]))
    rows = [["memory, GiB", *(f"stage {stage}" for stage in stages)]]
    for name, values in prediction.memory.items():
        if values.max() > 0:
            rows.append([name.replace("_", " "), *(f"{values[stage] / GIB:.2f}" for stage in stages)])
    rows.append([f"sum, of {machine.memory_bytes / GIB:.1f}", *(f"{totals[stage] / GIB:.2f}" for stage in stages)])
    return table(rows, left=(0,))


def validation_as_text(report: ValidationReport) -> str:
    """Errors by chip and software, beside the baseline's, and why rows were left out."""
    headings = ["runs", "mean", "median", "p90", "bias", "order", "regret"]
    rows = [["time", *headings, "baseline mean"]]
    for name, metrics in report.time.items():
        base = report.baseline.get(name)
        rows.append([name, *_metrics(metrics), f"{base.mean:.1%}" if base else ""])
    parts = [table(rows, left=(0,))]
    if report.memory:
        rows = [["peak memory", *headings[:5]]]
        rows += [[name, *_metrics(metrics)[:5]] for name, metrics in report.memory.items()]
        parts.append(table(rows, left=(0,)))
    if report.skipped:
        reasons: dict[str, int] = {}
        for skipped in report.skipped:
            reasons[skipped.reason] = reasons.get(skipped.reason, 0) + 1
        lines = [f"  {count:>5}  {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]
        parts.append(f"{counted(len(report.skipped), 'row')} skipped:\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _metrics(metrics: Metrics) -> list[str]:
    def share(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.1%}"

    return [
        str(metrics.runs),
        share(metrics.mean),
        share(metrics.median),
        share(metrics.p90),
        share(metrics.bias, "+"),
        share(metrics.pair_order),
        share(metrics.regret),
    ]


def calibration_as_text(calibration: Calibration, start: Site) -> str:
    low, high = calibration.interval
    if calibration.held_out is None:
        held = "no held-out error: the runs are of one configuration; the spread is that of the start"
    else:
        held = (
            f"held out by {calibration.held_out_by}: {calibration.held_out:.1%}; {calibration.inside} of "
            f"{calibration.runs} runs inside the interval"
        )
    return "\n".join(
        [
            f"{counted(calibration.runs, 'run')}; mean error of {start.name}: {calibration.before:.1%}, of the new "
            f"site: {calibration.fitted:.1%}",
            held,
            f"interval: 8 of 10 steps take from {1 - low:.1%} less to {high - 1:.1%} more than is predicted "
            f"(spread {calibration.site.relative_sigma:.1%}, one standard deviation of log time)",
            *(f"note: {warning}" for warning in calibration.warnings),
            *(f"skipped {one.id}: {one.reason}" for one in calibration.skipped),
        ]
    )


def table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Columns in line, numbers to the right; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
