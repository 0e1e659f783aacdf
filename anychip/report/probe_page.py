"""One HTML file about one probe: everything inline, nothing loaded from a network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from anychip.files import write_text
from anychip.report.charts import Series, line_chart
from anychip.report.templates import render_template
from anychip.verify.probe.canary import WINDOW
from anychip.verify.probe.run import ProbeReport

_CHINESE = {"fit": "合格", "fit with fall-backs": "合格（部分算子退回参考实现）", "unfit": "不合格"}


@dataclass(frozen=True)
class Row:
    """A line of the table of operators."""

    operator: str
    checks: int
    findings: int


def write_probe_page(report: ProbeReport, path: Path) -> None:
    write_text(path, render(report))


def render(report: ProbeReport) -> str:
    """The page as text."""
    found = Counter(finding.operator for finding in report.findings)
    others = [operator for operator in found if operator not in report.operators]
    checks = {**report.operators, **dict.fromkeys(others, 0)}
    return render_template(
        "probe_page.html",
        report=report,
        fitness_zh=_CHINESE[report.verdict.fitness],
        rows=[Row(operator, count, found[operator]) for operator, count in checks.items()],
        canary=_canary(report),
    )


def _canary(report: ProbeReport) -> Markup | None:
    if report.canary is None:
        return None
    steps = [float((n + 1) * WINDOW) for n in range(len(report.canary["losses"]))]
    curves = (("low", "line-faint"), ("high", "line-faint"), ("losses", "line-main"))
    series = [Series(name, list(zip(steps, report.canary[name], strict=True)), style) for name, style in curves]
    return line_chart(series, "loss of the canary over steps", "steps 步数")
