"""What `anychip plan` says of a mixed cluster: the pipelines, days and energy after failures, what was assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anychip.plan.answer import goodput_json
from anychip.plan.goodput import Goodput, goodput
from anychip.plan.layouts import overrides_of
from anychip.plan.mixed import Alone, MixedPlan, MixedResult, reliability_of_parts, search_mixed
from anychip.plan.models import ModelStage
from anychip.plan.question import Question
from anychip.plan.types import Machine, Workload


@dataclass(frozen=True)
class MixedAnswer:
    """Everything that the table and the JSON are made of."""

    name: str  # of the cluster
    workload: Workload
    machines: tuple[Machine, ...]
    between_bytes_per_s: float
    result: MixedResult
    total_tokens: float
    goodput: Goodput | None  # of the best pipeline; None when there is none
    notes: tuple[str, ...]


def answer_mixed(question: Question, model: ModelStage) -> MixedAnswer:
    """Plan one model over all kinds of chips of a question."""
    workload = model.workload
    result = search_mixed(workload, question.machines, question.sites, question.between_bytes_per_s, question.failures)
    found = None
    if result.best:
        best = result.best[0]
        held = reliability_of_parts(workload, question.machines, best.devices_used, question.failures)
        sigma = max(site.relative_sigma for site in question.sites)  # no run over several kinds has been published
        watts = _watts(question.machines, best)
        found = goodput(best.step_seconds, sigma, workload.tokens, model.tokens, held, watts)
    return MixedAnswer(
        name=question.name,
        workload=workload,
        machines=question.machines,
        between_bytes_per_s=question.between_bytes_per_s,
        result=result,
        total_tokens=model.tokens,
        goodput=found,
        notes=_notes(question, result),
    )


def _watts(machines: Sequence[Machine], plan: MixedPlan) -> float | None:
    """Of all devices in use; None when that of one kind is unknown."""
    known = [(machine.watts_per_device, plan.devices_used[machine.name]) for machine in machines]
    return None if any(watts is None for watts, _ in known) else sum((watts or 0.0) * count for watts, count in known)


def _notes(question: Question, result: MixedResult) -> tuple[str, ...]:
    notes = []
    for machine in question.machines if result.best else ():
        used = result.best[0].devices_used[machine.name]
        if used < machine.devices:
            idle = machine.devices - used
            notes.append(f"{used:,} of {machine.devices:,} devices of {machine.name} are used; {idle:,} idle")
    for machine, site in zip(question.machines, question.sites, strict=True):
        notes += [f"assumed: {what} ({machine.name})" for what in machine.assumed]
        if site.peak_tflops:
            notes.append(f"{machine.name}: peak {site.peak_tflops:g} TFLOP/s by the site {site.name}: {site.source}")
    if question.failures.spare_nodes:
        notes.append("assumed: a spare node stands in for a node of any kind")
    return tuple(notes)


def options_of(plan: MixedPlan, machines: Sequence[Machine]) -> list[str] | None:
    """What `--set` must be given to train in a pipeline; None where our training cannot join its parts: stages on chips
    of different makes exchange through host memory, which is made for stages of one process each."""
    if len({machine.torch_device_type for machine in machines}) == 1:
        return overrides_of(plan.layout)
    if plan.layout.devices > plan.layout.pp:
        return None
    return [*overrides_of(plan.layout), "parallel.host_transfers=true"]


def mixed_json(answer: MixedAnswer) -> dict[str, Any]:
    """The answer as JSON values: seconds, bytes, tokens a second of the whole cluster."""
    result = answer.result
    return {
        "workload": {"name": answer.workload.name, "tokens_per_step": answer.workload.tokens},
        "machines": [
            {
                "name": machine.name,
                "chip": machine.chip,
                "devices": machine.devices,
                "memory_bytes": machine.memory_bytes,
            }
            for machine in answer.machines
        ],
        "total_tokens": answer.total_tokens,
        "best": [_plan_json(plan, answer.machines) for plan in result.best],
        "goodput": goodput_json(answer.goodput) if answer.goodput else None,
        "alone": {name: _alone_json(part) for name, part in result.alone.items()},
        "gain": result.gain,
        "verdict": result.verdict,
        "rejected": [{"layout": str(each.layout), "reason": each.reason} for each in result.rejected],
        "seconds": result.seconds,
        "notes": list(answer.notes),
    }


def _plan_json(plan: MixedPlan, machines: Sequence[Machine]) -> dict[str, Any]:
    return {
        "layout": str(plan.layout),
        "overrides": options_of(plan, machines),
        "stage_layers": list(plan.layout.stage_layers),
        "groups": list(plan.groups),
        "step_seconds": plan.step_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "useful_share": plan.useful,
        "mfu": plan.mfu,
        "time": plan.time,
        "stage_seconds": [float(value) for value in plan.stage_seconds],
        "memory_bytes": [float(value) for value in plan.memory_bytes],
        "memory_by_stage": {term: [float(value) for value in values] for term, values in plan.memory.items()},
        "devices_used": plan.devices_used,
    }


def _alone_json(part: Alone) -> dict[str, Any]:
    found = part.prediction
    return {
        "devices": part.devices,
        "devices_used": found.layout.devices if found else 0,
        "layout": str(found.layout) if found else None,
        "tokens_per_second": found.tokens_per_second_per_device * found.layout.devices if found else 0.0,
        "useful_share": part.useful,
        "said": part.said,
    }
