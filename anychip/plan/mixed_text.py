"""The plan of a mixed cluster as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from anychip.plan.goodput import SECONDS_A_DAY
from anychip.plan.mixed import Alone, MixedPlan
from anychip.plan.mixed_answer import MixedAnswer, options_of
from anychip.plan.predict import GIB
from anychip.plan.text import goodput_text, table
from anychip.plan.types import Machine

_REJECTED_SHOWN = 5


def mixed_as_text(answer: MixedAnswer, title: str = "") -> str:
    """The parts, the ten best pipelines, time and memory of the best one, what mixing is worth, what is rejected."""
    result = answer.result
    parts = [_heading(answer, title)]
    if result.best:
        parts += [_plans_table(answer), _explanation(answer, result.best[0])]
    if answer.goodput is not None:
        parts.append(goodput_text(answer.goodput))
    parts.append("\n".join([*(alone_text(name, part) for name, part in result.alone.items()), result.verdict]))
    if result.rejected:
        rows = [f"  {each.layout}: {each.reason}" for each in result.rejected[:_REJECTED_SHOWN]]
        more = len(result.rejected) - len(rows)
        rows += [f"  and {more:,} more (--json lists all)"] if more else []
        parts.append("\n".join(["rejected, those that lack least first:", *rows]))
    if answer.notes:
        parts.append("\n".join(answer.notes))
    return "\n\n".join(parts)


def _heading(answer: MixedAnswer, title: str) -> str:
    kinds = [
        f"{machine.name}: {machine.devices:,} x {machine.chip}, {machine.memory_bytes / GIB:.0f} GiB each"
        for machine in answer.machines
    ]
    between = f"{answer.between_bytes_per_s * 8 / 1e9:g} Gbit/s a device between kinds"
    name = f"{answer.workload.name} on {answer.name}" + (f", {title}" if title else "")
    tokens = f"{answer.workload.tokens:,} tokens a step, {answer.total_tokens:.3g} in all"
    return "\n".join([f"{name}: {tokens}", *kinds, between])


def _plans_table(answer: MixedAnswer) -> str:
    rows = [["", "layout", "stages", "layers", "step", "tok/s", "mfu", "days", "GiB"]]
    for number, plan in enumerate(answer.result.best, 1):
        rows.append(
            [
                str(number),
                str(plan.layout),
                stages_text(plan),
                layers_text(plan),
                f"{plan.step_seconds:.2f} s",
                f"{plan.tokens_per_second:,.0f}",
                f"{plan.mfu:.1%}",
                f"{answer.total_tokens / plan.tokens_per_second / SECONDS_A_DAY:,.1f}",
                ", ".join(f"{plan.memory_bytes[stage] / GIB:.1f}" for stage in _fullest(plan).values()),
            ]
        )
    return table(rows, left=(1, 2, 3, 8))


def stages_text(plan: MixedPlan) -> str:
    """Which chips the stages lie on, in order."""
    return " then ".join(f"{count} on {group}" for group, count in _runs(plan.groups))


def layers_text(plan: MixedPlan) -> str:
    """Layers of the stages in order: "2x12 13" are two of 12 and one of 13."""
    counts = [str(count) for count in plan.layout.stage_layers]
    return " ".join(f"{count}x{layers}" if count > 1 else layers for layers, count in _runs(counts))


def _runs(values: Sequence[str]) -> list[tuple[str, int]]:
    return [(value, len(list(same))) for value, same in groupby(values)]


def _fullest(plan: MixedPlan) -> dict[str, int]:
    """The fullest stage of each part, in the order of the pipeline."""
    held = plan.memory_bytes
    names = dict.fromkeys(plan.groups)
    return {
        name: max((s for s, group in enumerate(plan.groups) if group == name), key=lambda s: held[s]) for name in names
    }


def _explanation(answer: MixedAnswer, plan: MixedPlan) -> str:
    """The best pipeline: where its slowest stage's time goes, what fills memory, how to train with it."""
    slowest = int(plan.stage_seconds.argmax())
    rows = [["time", "seconds", "share"]]
    for name, seconds in sorted(plan.time.items(), key=lambda item: -item[1]):
        if seconds > 0:
            rows.append([name.replace("_", " "), f"{seconds:.4g}", f"{seconds / plan.step_seconds:.1%}"])
    return "\n".join(
        [
            f"layout {plan.layout}: step {plan.step_seconds:.3g} s, as its slowest stage spends it: stage {slowest} "
            f"with {plan.layout.stage_layers[slowest]} layers on {plan.groups[slowest]}",
            "",
            table(rows, left=(0,)),
            "",
            _memory_table(plan, answer.machines),
            "",
            training_text(plan, answer.machines),
        ]
    )


def training_text(plan: MixedPlan, machines: Sequence[Machine]) -> str:
    """The options that train in a pipeline, or why there are none."""
    options = options_of(plan, machines)
    if options is None:
        return "our training joins chips of different makes by stages of one process each only, so not in this pipeline"
    return "to train with it: " + " ".join(f"--set {option}" for option in options)


def _memory_table(plan: MixedPlan, machines: Sequence[Machine]) -> str:
    """GiB by term of the first stage, the fullest of each part, and the last."""
    room = {machine.name: machine.memory_bytes / GIB for machine in machines}
    stages = sorted({0, *_fullest(plan).values(), len(plan.groups) - 1})
    rows = [["memory, GiB", *(f"stage {stage}, {plan.groups[stage]}" for stage in stages)]]
    for name, values in plan.memory.items():
        if values.max() > 0:
            rows.append([name.replace("_", " "), *(f"{values[stage] / GIB:.2f}" for stage in stages)])
    rows.append(
        ["sum", *(f"{plan.memory_bytes[stage] / GIB:.2f} of {room[plan.groups[stage]]:.1f}" for stage in stages)]
    )
    return table(rows, left=(0,))


def alone_text(name: str, part: Alone) -> str:
    """What one part reaches by itself, or why not."""
    found = part.prediction
    if found is None:
        return f"{name} alone: not at all, {part.said}"
    rate = f"{found.tokens_per_second_per_device * found.layout.devices:,.0f} tokens/s"
    return f"{name} alone: {found.layout}, {rate}" + (f" ({part.said})" if part.said else "")
