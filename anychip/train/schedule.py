"""Learning rate by step, as a share of the peak."""

from __future__ import annotations

import math

from anychip.recipe.schema import ScheduleConfig


def lr_share(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak rate at `step` (from 0) of `steps`: linear warm-up, then the schedule's shape.

    cosine: half a cosine down to `min_lr_fraction` (arXiv 1608.03983). wsd: constant, then linear over the last
    `decay_fraction` of the steps (warm-up-stable-decay, arXiv 2404.06395). constant: no decay.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    low = schedule.min_lr_fraction
    if schedule.kind == "cosine":
        done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if schedule.kind == "wsd":
        decay_steps = max(1, round(steps * schedule.decay_fraction))
        return max(low, 1 - (1 - low) * max(0, step - (steps - decay_steps)) / decay_steps)
    return 1.0
