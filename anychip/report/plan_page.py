"""One HTML file about one plan: everything inline, nothing loaded from a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup

from anychip.errors import InputError
from anychip.files import write_text
from anychip.plan.answer import PlanAnswer, nearest_rejected, rejected_counts, reliability_of
from anychip.plan.goodput import goodput
from anychip.plan.mixed import MixedPlan
from anychip.plan.predict import GIB
from anychip.plan.search import search
from anychip.plan.text import days_text
from anychip.plan.types import Machine, Prediction
from anychip.report.charts import Series, line_chart
from anychip.report.stacks import COLOURS, Block, Stack, stacked_chart, timeline_chart
from anychip.report.templates import render_template

_MOST_STAGES, _MOST_BLOCKS = 24, 6000
_COUNT_FACTORS = (0.125, 0.25, 0.5, 1, 2)
_FAILURE_RATES = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
_REASONS_SHOWN = _NEAREST_SHOWN = 12
_MOST_REJECTED = 2000


@dataclass(frozen=True)
class Row:
    """A line of the table of layouts."""

    layout: str
    step: str
    rate: str
    mfu: str
    memory: str


def write_plan_page(answer: PlanAnswer, path: Path) -> None:
    """Write the page of a plan. The sweeps over chips and failures are computed here."""
    write_text(path, render(answer))


def render(answer: PlanAnswer) -> str:
    """The page as text."""
    chosen = answer.chosen
    shown = answer.search.best or [chosen]
    terms = terms_of(shown)
    kinds = [name for name, held in chosen.memory.items() if held.max() > 0]
    rejected = sorted(rejected_counts(answer.search).items(), key=lambda item: -item[1])
    return render_template(
        "plan_page.html",
        answer=answer,
        chosen=chosen,
        found=answer.goodput,
        days=days_text(answer.goodput.days),
        low=days_text(answer.goodput.days_interval[0]),
        high=days_text(answer.goodput.days_interval[1]),
        rows=[_row(prediction) for prediction in answer.search.best],
        overrides=" ".join(f"--set {value}" for value in answer.overrides),
        terms=legend_of(terms),
        time=time_chart(shown, terms),
        kinds=legend_of(kinds),
        memory=_memory(chosen, answer.machine, kinds),
        timeline=_timeline(answer),
        counts=_throughput_by_count(answer),
        rates=_goodput_by_rate(answer),
        losses=[(name, f"{share:.2%}") for name, share in answer.goodput.losses.items() if share >= 5e-5],
        rejected=rejected[:_REASONS_SHOWN],
        rejected_left=max(0, len(rejected) - _REASONS_SHOWN),
        nearest=nearest_rejected(answer.search, _NEAREST_SHOWN),
        each=answer.search.rejected[:_MOST_REJECTED],
        each_left=max(0, len(answer.search.rejected) - _MOST_REJECTED),
    )


def _row(prediction: Prediction) -> Row:
    return Row(
        str(prediction.layout),
        f"{prediction.step_seconds:.3g} s",
        f"{prediction.tokens_per_second_per_device:,.0f}",
        f"{prediction.mfu:.1%}",
        f"{prediction.memory_bytes / GIB:.1f} GiB",
    )


def legend_of(names: list[str]) -> list[tuple[str, str]]:
    """Names of terms with the class of the colour that a stack gives them."""
    return [(f"term-{index % COLOURS}", name.replace("_", " ")) for index, name in enumerate(names)]


def terms_of(plans: Sequence[Prediction] | Sequence[MixedPlan]) -> list[str]:
    """The terms that any of these spends time on."""
    return [name for name in plans[0].time if any(plan.time[name] > 0 for plan in plans)]


def time_chart(shown: Sequence[Prediction] | Sequence[MixedPlan], terms: list[str]) -> Markup:
    stacks = [Stack(str(p.layout), p.time, f"{p.step_seconds:.3g} s") for p in shown]
    return stacked_chart(stacks, terms, "seconds of a step by term")


def _memory(chosen: Prediction, machine: Machine, kinds: list[str]) -> Markup:
    """Every stage, or as many as fit a page with the ends among them."""
    stages = len(chosen.memory_by_stage)
    shown = range(stages) if stages <= _MOST_STAGES else [*range(_MOST_STAGES // 2), *range(stages - 12, stages)]
    stacks = [memory_stack(chosen, stage) for stage in shown]
    return stacked_chart(stacks, kinds, "memory of each stage by term", machine.memory_bytes)


def memory_stack(plan: Prediction | MixedPlan, stage: int) -> Stack:
    held = {name: float(values[stage]) for name, values in plan.memory.items()}
    return Stack(f"stage {stage}", held, f"{sum(held.values()) / GIB:.1f} GiB")


def _timeline(answer: PlanAnswer) -> Markup | None:
    if answer.timeline is None:
        return None
    blocks = [
        Block(
            event.stage, event.start, event.end, f"pass-{event.kind}",
            f"{event.kind} of micro-batch {event.micro_batch}, chunk {event.chunk}",
        )
        for event in answer.timeline.events[:_MOST_BLOCKS]
    ]  # fmt: skip
    return timeline_chart(blocks, answer.timeline.stages, "the pipeline's timeline")


def _throughput_by_count(answer: PlanAnswer) -> Markup | None:
    """The best layout's tokens a second of the whole machine, for fewer and more devices of the same kind."""
    points: list[tuple[float, float]] = []
    for factor in _COUNT_FACTORS:
        machine = _resized(answer.machine, factor)
        if machine is None:
            continue
        try:
            best = search(
                answer.workload, machine, answer.site, context_method=answer.chosen.layout.context_method
            ).best
        except InputError:
            continue
        if best:
            points.append((float(machine.devices), best[0].tokens_per_second_per_device * machine.devices))
    if len(points) < 2:
        return None
    ideal = [(count, points[0][1] / points[0][0] * count) for count, _ in points]
    series = [Series("in proportion", ideal, "line-faint"), Series("predicted", points, "line-main", dots=True)]
    return line_chart(series, "tokens a second over devices", "devices 卡数", y_from_zero=True)


def _resized(machine: Machine, factor: float) -> Machine | None:
    """The machine with more or fewer nodes; None where they are not whole, or nothing is said of links between them."""
    devices = int(machine.devices * factor)
    if devices < 1 or devices % machine.devices_per_node or (factor > 1 and len(machine.tiers) == 1):
        return None
    *inner, last = machine.tiers
    return replace(machine, devices=devices, tiers=(*inner, replace(last, devices=max(last.devices, devices))))


def _goodput_by_rate(answer: PlanAnswer) -> Markup:
    """Useful share of the time over the failure rate, all else as in the cluster file."""
    points: list[tuple[float, float]] = []
    for rate in _FAILURE_RATES:
        failures = answer.failures.model_copy(update={"per_1000_node_days": rate})
        held = reliability_of(answer.workload, answer.machine, failures)
        found = goodput(answer.chosen.step_seconds, 0.0, answer.workload.tokens, answer.total_tokens, held)
        points.append((rate, found.effective))
    return line_chart(
        [Series("useful time", points, "line-main", dots=True)],
        "useful share of the time over failures per 1000 node-days",
        "failures per 1000 node-days 每千节点日故障数",
        x_log=True,
        y_format=lambda share: f"{share:.0%}",
    )
