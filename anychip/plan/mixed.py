"""Mixed clusters: pipeline stages on chips of different kinds, each with the layers that it can carry.

All stages share the tensor-, data- and expert-parallel degrees; a group of chips takes a run of consecutive stages.
Layers are alike, so sharing them out so that the slowest stage is fastest is exact; memory bounds what each stage may
take. What is found is compared with the best plan of each part by itself, on as many of its nodes as serve it best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from anychip.errors import InputError
from anychip.plan.answer import reliability_of
from anychip.plan.cost import layer_cost
from anychip.plan.goodput import CHECKPOINT_BYTES_PER_PARAMETER, Reliability, goodput, reliability
from anychip.plan.mixed_stages import Candidate, Part, candidate_of, layouts, one_of
from anychip.plan.pipeline import pipeline_seconds
from anychip.plan.predict import GIB, hardware_for, measured
from anychip.plan.search import search
from anychip.plan.shapes import flops_per_token, num_parameters, work_of
from anychip.plan.table import peak_of, table_of
from anychip.plan.types import Floats, Layout, Machine, Prediction, Rejected, Site, Workload
from anychip.plan.usable import search_usable
from anychip.recipe.cluster import FailureConfig

SETTLED = 12  # candidates whose pipeline is simulated
_NOTHING_FAILS = FailureConfig()


@dataclass(frozen=True)
class MixedPlan:
    """A pipeline over several kinds of chips."""

    layout: Layout  # stage_layers holds the layers of every stage in order
    groups: tuple[str, ...]  # name of the machine of each stage
    step_seconds: float
    tokens_per_second: float  # of the whole cluster
    useful: float  # share of the time that failures leave
    mfu: float  # against the peaks of the devices in use
    stage_seconds: Floats  # [stages], one micro-batch
    time: dict[str, float]  # seconds by term, of the slowest stage; they add up to step_seconds
    memory: dict[str, Floats]  # bytes by term, each [stages]
    devices_used: dict[str, int]

    @property
    def memory_bytes(self) -> Floats:
        """Bytes of every stage, [stages]."""
        return np.asarray(sum(self.memory.values()), dtype=np.float64)


@dataclass(frozen=True)
class Alone:
    """One part by itself: its best plan, or why there is none."""

    devices: int  # of the part
    prediction: Prediction | None
    useful: float = 1.0  # share of the time that failures leave
    said: str = ""  # which of its devices are idle, or why it cannot run this

    @property
    def useful_tokens_per_second(self) -> float:
        """Of the whole part, after failures."""
        found = self.prediction
        return found.tokens_per_second_per_device * found.layout.devices * self.useful if found else 0.0


@dataclass(frozen=True)
class MixedResult:
    best: list[MixedPlan]
    alone: dict[str, Alone]
    rejected: list[Rejected]  # those that lack least come first
    gain: float  # tokens a day of the best plan over those of the best part alone, after failures
    seconds: float

    @property
    def verdict(self) -> str:
        """What mixing is worth, in a sentence."""
        if not self.best:
            nearest = self.rejected[0] if self.rejected else None
            return "No layout over all parts fits" + (
                f"; nearest is {nearest.layout}: {nearest.reason}."
                if nearest
                else ": there are more stages than layers."
            )
        name = max(self.alone, key=lambda key: self.alone[key].useful_tokens_per_second)
        part = self.alone[name].prediction
        if part is None:
            return "No part can run this alone; together they can."
        on = f"{name} alone" if part.layout.devices == self.alone[name].devices else (
            f"{name} alone on {part.layout.devices:,} of its {self.alone[name].devices:,} devices"
        )  # fmt: skip
        if self.gain <= 1.0:
            return f"Do not mix: {on} is {1 / self.gain:.2f} times as fast as the best pipeline over all parts."
        if self.gain < 1.005:
            return f"All parts together are hardly faster than {on}: mixing gains nothing."
        return f"All parts together are {self.gain:.2f} times as fast as {on}."


def search_mixed(
    workload: Workload,
    machines: Sequence[Machine],
    sites: Sequence[Site],
    between_bytes_per_s: float,
    failures: FailureConfig = _NOTHING_FAILS,
    *,
    keep: int = 10,
) -> MixedResult:
    """The best pipelines over all machines, compared with the best plan on each machine alone.

    `between_bytes_per_s` is what one device can send to a device of another machine.
    """
    started = time.perf_counter()
    if len(machines) < 2:
        raise InputError("a mixed plan needs at least two kinds of chips.", do="Use `search` for one kind.")
    machines = [measured(machine, site) for machine, site in zip(machines, sites, strict=True)]
    alone = {
        machine.name: _alone(workload, machine, site, failures) for machine, site in zip(machines, sites, strict=True)
    }
    lacking: list[tuple[float, Rejected]] = []
    candidates: list[Candidate] = []
    for order in permutations(range(len(machines))):
        parts = [Part(machines[index], sites[index]) for index in order]
        for layout, counts, reason in layouts(workload, parts):
            found = candidate_of(workload, layout, counts, parts, between_bytes_per_s) if not reason else None
            if isinstance(found, Candidate):
                candidates.append(found)
            else:
                lack, why = found or (math.inf, reason)
                lacking.append((lack, Rejected(layout, why)))
    candidates.sort(key=lambda candidate: candidate.estimate)
    plans = [_simulate(workload, candidate, failures) for candidate in candidates[:SETTLED]]
    plans.sort(key=lambda plan: -plan.tokens_per_second * plan.useful)
    best_alone = max(part.useful_tokens_per_second for part in alone.values())
    gain = plans[0].tokens_per_second * plans[0].useful / best_alone if plans and best_alone else 0.0
    rejected = [each for _, each in sorted(lacking, key=lambda pair: pair[0])]
    return MixedResult(plans[:keep], alone, rejected, gain, time.perf_counter() - started)


def _alone(workload: Workload, machine: Machine, site: Site, failures: FailureConfig) -> Alone:
    try:
        result, part, idle = search_usable(workload, machine, site, lambda part: search(workload, part, site, keep=1))
    except InputError as error:
        return Alone(machine.devices, None, said=error.what.rstrip("."))
    if not result.best:
        return Alone(machine.devices, None, said=f"it fits in none of {result.considered:,} layouts: {result.notes[0]}")
    useful = _useful(workload, result.best[0].step_seconds, reliability_of(workload, part, failures))
    return Alone(machine.devices, result.best[0], useful, idle)


def _useful(workload: Workload, step_seconds: float, held: Reliability) -> float:
    return goodput(step_seconds, 0.0, workload.tokens, workload.tokens, held).effective


def reliability_of_parts(
    workload: Workload, machines: Sequence[Machine], used: dict[str, int], failures: FailureConfig
) -> Reliability:
    """How a job fails on the nodes that it uses of several machines."""
    nodes = sum(math.ceil(used[machine.name] / machine.devices_per_node) for machine in machines)
    state_bytes = CHECKPOINT_BYTES_PER_PARAMETER * float(num_parameters(workload))
    return reliability(failures, nodes, sum(used.values()), state_bytes)


def _simulate(workload: Workload, candidate: Candidate, failures: FailureConfig) -> MixedPlan:
    layout, parts = candidate.layout, candidate.parts
    m = layout.micro_batches(workload)
    still, length = (
        pipeline_seconds(candidate.times, layout.pp, m, layout.schedule, send) for send in (0.0, candidate.send_seconds)
    )
    step = length + sum(candidate.outside.values())
    per_stage = layout.tp * layout.dp
    used = {part.machine.name: candidate.of_stage.count(index) * per_stage for index, part in enumerate(parts)}
    peak = sum(used[part.machine.name] * peak_of(part.machine, workload.dtype) for part in parts)
    rate = workload.tokens / step
    held = reliability_of_parts(workload, [part.machine for part in parts], used, failures)
    return MixedPlan(
        layout=layout,
        groups=tuple(parts[part].machine.name for part in candidate.of_stage),
        step_seconds=step,
        tokens_per_second=rate,
        useful=_useful(workload, step, held),
        mfu=rate * float(flops_per_token(work_of(workload))) / peak,
        stage_seconds=np.array([stage.forward + stage.backward for stage in candidate.times]),
        time=_terms(workload, candidate, m, still, length),
        memory=candidate.memory,
        devices_used=used,
    )


def _terms(workload: Workload, candidate: Candidate, m: int, still: float, length: float) -> dict[str, float]:
    """The step by terms as the slowest stage spends it; what it waits for others is bubble."""
    busy = [stage.forward + stage.backward for stage in candidate.times]
    slowest = int(np.argmax(busy))
    part = candidate.parts[candidate.of_stage[slowest]]
    w = work_of(workload)
    layer = layer_cost(
        w, table_of([candidate.layout], w.layers), hardware_for(part.machine, workload, part.site), part.site
    )
    count = m * candidate.layout.stage_layers[slowest]
    both = {
        "matmul": "matmul", "attention": "attention", "pointwise": "pointwise", "overhead": "overhead",
        "tensor_parallel": "tensor", "expert_parallel": "expert",
    }  # fmt: skip
    time = {
        name: count * (one_of(getattr(layer.forward, kind)) + one_of(getattr(layer.backward, kind)))
        for name, kind in both.items()
    }
    time["recompute"] = count * one_of(layer.recomputed)
    time["ends"] = m * ((slowest == 0) * candidate.ends[0] + (slowest == len(busy) - 1) * candidate.ends[1])
    time["bubble"] = still - m * busy[slowest]
    time["pipeline_transfer"] = length - still
    for name, seconds in candidate.outside.items():
        time[name] = time.get(name, 0.0) + seconds
    return time


def headroom(plan: MixedPlan, machines: Sequence[Machine]) -> dict[str, float]:
    """GiB that the fullest stage of each machine leaves free."""
    free: dict[str, float] = {}
    for machine in machines:
        held = [size for size, name in zip(plan.memory_bytes, plan.groups, strict=True) if name == machine.name]
        free[machine.name] = (machine.memory_bytes - max(held)) / GIB
    return free
