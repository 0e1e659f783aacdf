"""What `anychip plan` finds out for one recipe on one kind of chips: the layouts, the time, the memory, the days."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from anychip.errors import UnfitError
from anychip.plan.goodput import (
    CHECKPOINT_BYTES_PER_PARAMETER,
    SECONDS_A_DAY,
    Goodput,
    Reliability,
    goodput,
    objective_after_failures,
    reliability,
)
from anychip.plan.layouts import overrides_of
from anychip.plan.pipeline import simulate_pipeline
from anychip.plan.predict import predict
from anychip.plan.rules import left_out
from anychip.plan.search import Rejections, search, simulated, stage_times
from anychip.plan.shapes import num_parameters
from anychip.plan.types import (
    ContextMethod,
    Layout,
    Machine,
    Prediction,
    Rejected,
    SearchResult,
    Site,
    Timeline,
    Workload,
)
from anychip.plan.usable import search_usable
from anychip.recipe.cluster import FailureConfig

_NOTHING_FAILS = FailureConfig()


@dataclass(frozen=True)
class PlanAnswer:
    """Everything that the table, the JSON and the page are made of."""

    workload: Workload
    machine: Machine
    site: Site
    search: SearchResult
    chosen: Prediction  # the best layout, or the one that was asked for
    timeline: Timeline | None  # of the chosen layout's pipeline
    total_tokens: float
    failures: FailureConfig
    goodput: Goodput  # of the chosen layout
    left_out: tuple[str, ...] = ()  # why the search would not offer the chosen layout, memory aside
    notes: tuple[str, ...] = ()
    idle_devices: int = 0  # of the cluster, that no layout uses; `machine` is without them

    @property
    def overrides(self) -> list[str]:
        """What a recipe must be given to train in the chosen layout; empty where this software cannot, or another one
        is planned for."""
        return overrides_for(self.chosen, self.site) if not self.left_out else []

    @property
    def days(self) -> float:
        """Days for all tokens when nothing fails."""
        return days_of(self.chosen, self.workload, self.total_tokens)


def answer_plan(
    workload: Workload,
    machine: Machine,
    site: Site,
    total_tokens: float,
    layout: Layout | None = None,
    failures: FailureConfig = _NOTHING_FAILS,
    context_method: ContextMethod = "ring",
) -> PlanAnswer:
    """Search all layouts for the most tokens a day after failures, or predict the one given.

    Raises InputError when no layout divides, UnfitError when none fits.
    """
    idle, left_idle = "", 0
    if layout is not None:
        found = _settled(workload, layout, machine, site)
        result = SearchResult([found] if found.fits else [], (), 1, 0.0)
        chosen: Prediction | None = found
    else:
        whole = machine
        result, machine, idle = search_usable(
            workload,
            machine,
            site,
            lambda part: search(
                workload,
                part,
                site,
                objective_after_failures(reliability_of(workload, part, failures)),
                context_method=context_method,
            ),
        )
        left_idle = whole.devices - machine.devices
        chosen = result.best[0] if result.best else None
    held = reliability_of(workload, machine, failures)
    if chosen is None:
        raise UnfitError(
            f"{workload.name} fits on {machine.name} in none of {result.considered:,} layouts: "
            f"{'; '.join(result.notes)}.",
            do="Take more devices or a smaller micro-batch, or shorten seq_length.",
        )
    return PlanAnswer(
        workload=workload,
        machine=machine,
        site=site,
        search=result,
        chosen=chosen,
        timeline=timeline_of(workload, chosen.layout, machine, site),
        total_tokens=total_tokens,
        failures=failures,
        goodput=goodput(chosen.step_seconds, site.relative_sigma, workload.tokens, total_tokens, held, _watts(machine)),
        left_out=left_out(workload, chosen.layout, machine, site),
        notes=(*([idle] if idle else []), *(f"assumed: {what}" for what in machine.assumed)),
        idle_devices=left_idle,
    )


def reliability_of(workload: Workload, machine: Machine, failures: FailureConfig) -> Reliability:
    """How a job of this model fails on all nodes of a machine."""
    state_bytes = CHECKPOINT_BYTES_PER_PARAMETER * float(num_parameters(workload))
    return reliability(failures, machine.nodes, machine.devices, state_bytes)


def _watts(machine: Machine) -> float | None:
    return machine.watts_per_device * machine.devices if machine.watts_per_device else None


def _settled(workload: Workload, layout: Layout, machine: Machine, site: Site) -> Prediction:
    predicted = predict(workload, layout, machine, site)
    return simulated(workload, predicted, machine, site) if layout.pp > 1 else predicted


def timeline_of(workload: Workload, layout: Layout, machine: Machine, site: Site) -> Timeline | None:
    """The simulated pipeline, four rounds of micro-batches at most: later ones repeat."""
    if layout.pp == 1:
        return None
    stages = stage_times(workload, layout, machine, site)
    return simulate_pipeline(stages, layout.pp, min(layout.micro_batches(workload), 4 * layout.pp), layout.schedule)


def days_of(prediction: Prediction, workload: Workload, total_tokens: float) -> float:
    return total_tokens / workload.tokens * prediction.step_seconds / SECONDS_A_DAY


# --- as plain values --------------------------------------------------------------------------------------------


def as_json(answer: PlanAnswer) -> dict[str, Any]:
    """The answer as JSON values: seconds, bytes, tokens a second and device."""
    return {
        "workload": {"name": answer.workload.name, "tokens_per_step": answer.workload.tokens},
        "machine": {
            "name": answer.machine.name,
            "chip": answer.machine.chip,
            "devices": answer.machine.devices,
            "idle_devices": answer.idle_devices,
            "memory_bytes": answer.machine.memory_bytes,
        },
        "site": {"name": answer.site.name, "relative_sigma": answer.site.relative_sigma, "source": answer.site.source},
        "total_tokens": answer.total_tokens,
        "days_without_failures": answer.days,
        "goodput": goodput_json(answer.goodput),
        "chosen": chosen_json(answer),
        "best": [prediction_json(prediction, answer.site) for prediction in answer.search.best],
        "considered": answer.search.considered,
        "rejected": rejected_counts(answer.search),
        "rejected_layouts": [{"layout": one.name, "reason": one.reason} for one in answer.search.rejected],
        "search_seconds": answer.search.seconds,
        "notes": list(answer.notes),
    }


def goodput_json(found: Goodput) -> dict[str, Any]:
    """The goodput as JSON values; what is infinite becomes null."""
    values = dict(vars(found))
    values["days_interval"] = list(found.days_interval)
    return {name: None if value == math.inf else value for name, value in values.items()}


def explained_json(answer: PlanAnswer) -> dict[str, Any]:
    """The chosen layout, with what becomes of it and what was assumed."""
    return {**chosen_json(answer), "goodput": goodput_json(answer.goodput), "notes": list(answer.notes)}


def chosen_json(answer: PlanAnswer) -> dict[str, Any]:
    values = prediction_json(answer.chosen, answer.site)
    return {**values, "overrides": answer.overrides, "left_out": list(answer.left_out)}


def prediction_json(prediction: Prediction, site: Site) -> dict[str, Any]:
    return {
        "layout": str(prediction.layout),
        "stage_layers": list(prediction.layout.stage_layers),
        "overrides": overrides_for(prediction, site),
        "step_seconds": prediction.step_seconds,
        "interval_seconds": list(prediction.interval),
        "tokens_per_second_per_device": prediction.tokens_per_second_per_device,
        "model_tflops_per_device": prediction.tflops,
        "mfu": prediction.mfu,
        "time": prediction.time,
        "fits": prediction.fits,
        "reasons": list(prediction.reasons),
        "memory_bytes": prediction.memory_bytes,
        "memory_by_stage": {term: [float(value) for value in values] for term, values in prediction.memory.items()},
    }


def overrides_for(prediction: Prediction, site: Site) -> list[str]:
    """The options of a layout that fits, where the site has the memory of this software."""
    return overrides_of(prediction.layout) if prediction.fits and site.trained_here else []


def nearest_rejected(result: SearchResult, count: int) -> list[Rejected]:
    """Of the layouts that memory keeps out, those that lack least of it."""
    return result.rejected.nearest(count) if isinstance(result.rejected, Rejections) else []


def rejected_counts(result: SearchResult) -> dict[str, int]:
    """How many layouts were rejected for each reason."""
    return result.rejected.counts() if isinstance(result.rejected, Rejections) else {}
