"""One HTML file about the plan of a mixed cluster: the pipelines, their time, each stage's memory, each part alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from anychip.files import write_text
from anychip.plan.mixed import MixedPlan
from anychip.plan.mixed_answer import MixedAnswer
from anychip.plan.mixed_text import alone_text, layers_text, stages_text, training_text
from anychip.report.plan_page import legend_of, memory_stack, terms_of, time_chart
from anychip.report.stacks import stacked_chart
from anychip.report.templates import render_template

_REJECTED_SHOWN = 12


@dataclass(frozen=True)
class Row:
    """A line of the table of pipelines."""

    layout: str
    stages: str
    layers: str
    step: str
    rate: str
    mfu: str


def write_mixed_page(answer: MixedAnswer, path: Path) -> None:
    """Write the page of a mixed plan."""
    write_text(path, render(answer))


def render(answer: MixedAnswer) -> str:
    """The page as text."""
    result = answer.result
    best = result.best[0] if result.best else None
    terms = terms_of(result.best) if best else []
    kinds = [name for name, held in best.memory.items() if held.max() > 0] if best else []
    return render_template(
        "mixed_page.html",
        answer=answer,
        best=best,
        found=answer.goodput,
        rows=[_row(plan) for plan in result.best],
        training=training_text(best, answer.machines) if best else "",
        terms=legend_of(terms),
        time=time_chart(result.best, terms) if best else "",
        kinds=legend_of(kinds),
        memory=_memory(answer, best, kinds) if best else [],
        alone=[alone_text(name, part) for name, part in result.alone.items()],
        rejected=result.rejected[:_REJECTED_SHOWN],
        rejected_left=max(0, len(result.rejected) - _REJECTED_SHOWN),
    )


def _row(plan: MixedPlan) -> Row:
    return Row(
        str(plan.layout),
        stages_text(plan),
        layers_text(plan),
        f"{plan.step_seconds:.3g} s",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.mfu:.1%}",
    )


def _memory(answer: MixedAnswer, plan: MixedPlan, kinds: list[str]) -> list[tuple[str, Markup]]:
    """A chart for each kind of chips, since each has its own limit."""
    charts = []
    for machine in answer.machines:
        stacks = [memory_stack(plan, stage) for stage, group in enumerate(plan.groups) if group == machine.name]
        title = f"memory of each stage on {machine.name} by term"
        charts.append((machine.name, stacked_chart(stacks, kinds, title, machine.memory_bytes)))
    return charts
