"""What is left of a machine's time when nodes fail: share of useful time, days, energy, best checkpoint intervals.

Nodes fail as a Poisson process. A failure costs detection, restart, loading, and the work since the copy that it is
continued from: one in another node's memory if that survived, else one in storage. The expected time of a run is exact
for that process up to the stall of a storage save, which is spread over the memory intervals; with one tier it is
Daly's (Future Generation Computer Systems 22, 2006). `goodput_replay` plays the same process event by event.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from anychip.errors import InputError
from anychip.plan.predict import Predictions
from anychip.plan.search import Objective
from anychip.plan.types import Floats, eight_of_ten
from anychip.recipe.cluster import FailureConfig

SECONDS_A_DAY = 86_400.0
CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments
_MOST_COPIES_A_SAVE = 4096  # memory copies between two saves to storage


@dataclass(frozen=True)
class Reliability:
    """How a job of so many nodes fails and comes back, in seconds."""

    failures_per_s: float
    back_s: float  # detection and restart
    load_memory_s: float  # from another node's memory
    load_storage_s: float
    survives: float  # share of failures that memory copies outlive; 0: there are none
    stall_memory_s: float
    stall_storage_s: float
    write_s: float  # until a save to storage is safe; the next one begins after that
    waiting: float  # share of time in which no spare node is left
    stragglers: float  # factor on every step

    @property
    def recover_memory_s(self) -> float:
        return self.back_s + self.load_memory_s

    @property
    def recover_storage_s(self) -> float:
        """With the work that a save under way had not yet made safe."""
        return self.back_s + self.load_storage_s + self.write_s


@dataclass(frozen=True)
class Goodput:
    """What a job of `total_tokens` takes on a machine that fails."""

    effective: float  # useful share of the time: 1 minus the sum of `losses`
    losses: dict[str, float]  # share of the time by cause
    storage_interval_s: float  # useful seconds between saves to storage; inf when nothing fails
    memory_interval_s: float | None  # between copies to memory; None without them
    failures: float  # expected number
    days: float
    days_interval: tuple[float, float]  # 10th and 90th percentile, by the prediction's spread and by chance
    energy_mwh: float | None
    tokens_per_day: float


def reliability(failures: FailureConfig, nodes: int, devices: int, state_bytes: float) -> Reliability:
    """The inputs of a cluster file for a job of `nodes` nodes whose checkpoint holds `state_bytes`.

    Raises InputError when failures never leave time to come back.
    """
    rate = nodes * failures.per_1000_node_days / 1000 / SECONDS_A_DAY
    write = state_bytes / (failures.storage_gb_per_s * 1e9) if failures.storage_gb_per_s else 0.0
    copies = failures.memory_copy_seconds is not None
    found = Reliability(
        failures_per_s=rate,
        back_s=failures.detect_seconds + failures.restart_seconds,
        load_memory_s=failures.memory_load_seconds,
        load_storage_s=write if failures.load_seconds is None else failures.load_seconds,
        survives=failures.memory_copy_survives if copies else 0.0,
        stall_memory_s=failures.memory_copy_seconds or 0.0,
        stall_storage_s=failures.checkpoint_stall_seconds,
        write_s=write,
        waiting=_blocked(rate * failures.repair_hours * 3600, failures.spare_nodes),
        stragglers=_straggler_factor(failures, nodes, devices),
    )
    if rate * found.recover_storage_s > 50:
        raise InputError(
            f"a failure every {1 / rate:.1f} s leaves no time to come back in {found.recover_storage_s:.0f} s.",
            do="Lower failures.per_1000_node_days or the times to detect, restart and load.",
        )
    return found


def goodput(
    step_seconds: float,
    relative_sigma: float,
    tokens_per_step: float,
    total_tokens: float,
    held: Reliability,
    watts: float | None = None,
) -> Goodput:
    """Expected time of a job. `relative_sigma` is the spread of log(step time); `watts` of all devices together."""
    step = step_seconds * held.stragglers
    memory, storage, factor = best_intervals(held, step)
    running = factor / (1 - held.waiting)  # seconds that pass for a useful one
    work = total_tokens / tokens_per_step * step
    seconds = work * running
    expected_failures = held.failures_per_s * work * factor
    chance = _cost_of_failure(held, memory, storage) * math.sqrt(expected_failures) / seconds if seconds else 0.0
    days = seconds / SECONDS_A_DAY
    return Goodput(
        effective=1 / (running * held.stragglers),
        losses=_losses(held, memory, storage, factor),
        storage_interval_s=storage,
        memory_interval_s=memory if held.survives else None,
        failures=expected_failures,
        days=days,
        days_interval=eight_of_ten(days, math.hypot(relative_sigma, chance)),
        energy_mwh=watts * seconds / 3.6e9 if watts else None,
        tokens_per_day=total_tokens / days if days else 0.0,
    )


def best_intervals(held: Reliability, step_seconds: float) -> tuple[float, float, float]:
    """Useful seconds between memory copies and between saves to storage, and the seconds that then pass for each."""
    if not held.failures_per_s:
        return math.inf, math.inf, 1.0
    shortest = max(step_seconds, 1e-3)
    longest = max(20.0 / held.failures_per_s, 10 * shortest)
    intervals = np.geomspace(shortest, longest, 200)
    copies = np.unique(np.round(np.geomspace(1, _MOST_COPIES_A_SAVE, 40))) if held.survives else np.ones(1)
    memory, count = (axis.ravel() for axis in np.meshgrid(intervals, copies, indexing="ij"))
    factors = np.where(memory * count >= held.write_s, seconds_per_useful(held, memory, count), np.inf)
    best = int(factors.argmin())
    return float(memory[best]), float(memory[best] * count[best]), float(factors[best])


def seconds_per_useful(held: Reliability, memory: Floats, copies: Floats) -> Floats:
    """Expected seconds that pass for one useful second, [n]: memory copies every `memory` useful seconds, a save to
    storage at every `copies`-th.

    A segment between copies takes T. It fails with probability 1 - q, q = exp(-rate T), and is then repeated (a share s
    of failures) or the work since the last save is. With a the expected time of one try, the time to the next save is
    a S / (d alpha^K), where d = 1 - (1 - q) s, alpha = q / d and S = 1 + alpha + ... + alpha^(K - 1).
    """
    rate, share = held.failures_per_s, held.survives
    if not rate:
        return np.ones_like(memory)
    stall = (held.stall_memory_s if share else 0.0) + held.stall_storage_s / copies
    length = memory + stall
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        q = np.exp(-rate * length)
        lost = 1 / rate - length * q / (1 - q)  # mean time before a failure, given that there is one
        back = share * _despite_failures(rate, held.recover_memory_s)
        back += (1 - share) * _despite_failures(rate, held.recover_storage_s)
        a = q * length + (1 - q) * (lost + back)
        kept = 1 - (1 - q) * share
        alpha = q / kept
        total = np.where(alpha < 1, (1 - alpha**copies) / (1 - alpha), copies)
        seconds = a * total / (kept * alpha**copies)
    return np.where(np.isfinite(seconds), seconds / (memory * copies), np.inf)


def objective_after_failures(held: Reliability) -> Objective:
    """Tokens a day after failures, for `search`: a step is the least that can be lost."""

    def objective(predictions: Predictions) -> Floats:
        steps = predictions.step_seconds * held.stragglers
        grid = np.geomspace(float(steps.min()), float(steps.max()) * 1.001, 8)
        factors = np.array([best_intervals(held, float(step))[2] for step in grid])
        return predictions.tokens_per_second_per_device / np.interp(steps, grid, factors)

    return objective


def _despite_failures(rate: float, seconds: float) -> float:
    """Expected time of a recovery that starts anew whenever a node fails in it."""
    return math.expm1(rate * seconds) / rate


def _cost_of_failure(held: Reliability, memory: float, storage: float) -> float:
    """Seconds that one failure takes on average, to first order."""
    if not held.failures_per_s:
        return 0.0
    near = held.recover_memory_s + memory / 2
    far = held.recover_storage_s + storage / 2
    return held.survives * near + (1 - held.survives) * far


def _losses(held: Reliability, memory: float, storage: float, factor: float) -> dict[str, float]:
    """Shares of all time by cause; what no other cause explains is work done again."""
    share = (1 - held.waiting) / (factor * held.stragglers)  # of a second that is useful
    stalls = (held.stall_memory_s / memory if held.survives else 0.0) + held.stall_storage_s / storage
    losses = {"checkpoint stalls": stalls}
    for name, near, far in (
        ("detection and restart", held.back_s, held.back_s),
        ("loading", held.load_memory_s, held.load_storage_s),
    ):
        losses[name] = held.survives * _tried(held, near, held.recover_memory_s)
        losses[name] += (1 - held.survives) * _tried(held, far, held.recover_storage_s)
        losses[name] *= held.failures_per_s * factor
    losses = {name: seconds * share * held.stragglers for name, seconds in losses.items()}
    losses["waiting for nodes"] = held.waiting
    losses["stragglers"] = share * (held.stragglers - 1)
    again = 1 - share - sum(losses.values())
    return {"work done again": max(0.0, again), **losses}


def _tried(held: Reliability, part: float, recovery: float) -> float:
    """Mean seconds that a try to come back spends in a part of it: another failure may cut the try short."""
    if not held.failures_per_s or not recovery:
        return part
    return part / recovery * -math.expm1(-held.failures_per_s * recovery) / held.failures_per_s


def _blocked(offered: float, spares: int) -> float:
    """Share of time in which more nodes are being repaired than there are spares: Erlang's loss formula, because no
    further node fails while the job stands still."""
    if not offered:
        return 0.0
    blocked = 1.0
    for servers in range(1, spares + 2):
        blocked = offered * blocked / (servers + offered * blocked)
    return blocked


def _straggler_factor(failures: FailureConfig, nodes: int, devices: int) -> float:
    """A step ends with its slowest device: the expected largest of normal noises (Blom's approximation), and the chance
    that a slow node takes part."""
    noise = 0.0
    if failures.straggler_sigma and devices > 1:
        noise = failures.straggler_sigma * NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))
    slow = 1 - (1 - failures.slow_node_fraction) ** nodes
    return (1 + noise) * (1 + slow * (failures.slow_node_factor - 1))
