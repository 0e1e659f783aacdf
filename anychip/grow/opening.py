"""What makes a grown model's training differ for a while: masks that open, and parts younger than the rest.

Masks (arXiv 2305.02869). A masked part's weights W count as c * W, with c from 0 to 1 over some steps. What is stored
is c * W, so that the state is always the model's own, for whoever reads it; c is a function of the step. Around an
update the part is divided by c, its gradient multiplied, and it is multiplied by the next c: the optimizer sees W.

Ages. AdamW divides its moments by 1 - beta^t because they started at 0 when t was 0. Those of a part that is k steps
old started at 0 k steps ago: its update is made what k gives, for as long as that makes a difference. (A new layer
needs none of this, its tensors count their own steps.) Where a model grew before, those parts and their copies keep the
age that they have from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.grow.plan import CLOSED, GrowthPlan
from anychip.grow.tensors import copied_part, fresh_part
from anychip.model.arithmetic import parameter_shapes
from anychip.parallel.tensor import local, part_of
from anychip.recipe.schema import GrowthConfig
from anychip.train.optimizer import Optimizer

_SAME_AGE = 1e-6
"""beta^k below which a part is as old as the rest."""


def openness(steps: int, open_steps: int) -> float:
    """c after so many steps since growth."""
    return CLOSED if steps <= 0 else min(1.0, steps / open_steps)


@dataclass(frozen=True)
class Growing:
    """Training after a growth at step `grown_at`: a `train.job.Growing`."""

    plan: GrowthPlan
    growth: GrowthConfig
    grown_at: int
    earlier: tuple[tuple[GrowthPlan, int], ...] = ()  # growths before it, each with its step, the oldest first

    def lr_share(self, step: int) -> float:
        """Share of the scheduled rate at `step` (from 0): the re-warm after growth."""
        since, over, low = step - self.grown_at, self.growth.rewarm_steps, self.growth.rewarm_from
        return 1.0 if since >= over else low + (1 - low) * (since + 1) / over

    def lr_scale(self) -> dict[str, float]:
        """Factors of AdamW's rate by parameter, where they are not 1: muP's 1 / fan-in for matrices and the head
        (arXiv 2203.03466, table 3); embeddings, gains and biases keep their rate."""
        if self.growth.lr_rule == "keep":
            return {}
        old = dict(parameter_shapes(self.plan.old))
        ratios = {
            name: old[self.plan.parent_of(name)][-1] / shape[-1]
            for name, shape in parameter_shapes(self.plan.new)
            if len(shape) >= 2 and not name.startswith("embed_tokens")
        }
        return {name: ratio for name, ratio in ratios.items() if ratio != 1}

    def bind(self, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> NewParts:
        """For these parameters (or this process's parts of them)."""
        return NewParts(self, parameters, optimizer)


class NewParts:
    """The new parts of the parameters that are here. `step` counts from 1: the step that is being made."""

    def __init__(self, growing: Growing, parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        self._growing, self._parameters, self._optimizer = growing, parameters, optimizer
        plan = growing.plan
        self._masked: dict[str, Tensor] = {}
        for name, parameter in parameters.items() if growing.growth.mode == "masked" else ():
            region = _region(parameter, fresh_part(plan, name, closed=True))
            if region is not None:
                self._masked[name] = region
        counted = {name: p for name, p in parameters.items() if f"step.{name}" in optimizer.state()}
        self._younger = {name: found for name, p in counted.items() if (found := _younger(growing, name, p))}

    def scale_gradients(self, step: int) -> None:
        """Gradients of c * W become those of W; called before they are measured."""
        c = self._openness(step - 1)
        for name, region in self._masked.items() if c < 1 else ():
            gradient = self._parameters[name].grad
            if gradient is not None:
                _scale(local(gradient), region, c)

    @contextmanager
    def update(self, step: int, lr: float) -> Iterator[None]:
        """Around the optimizer's step."""
        before, after = self._openness(step - 1), self._openness(step)
        self._scale_weights(1 / before)
        yield
        self._correct_age(step, lr)
        self._scale_weights(after)

    def skip(self, step: int) -> None:
        """A step that counts and changed nothing."""
        self._scale_weights(self._openness(step) / self._openness(step - 1))

    def _openness(self, step: int) -> float:
        return openness(step - self._growing.grown_at, self._growing.growth.open_steps)

    @torch.no_grad()
    def _scale_weights(self, factor: float) -> None:
        for name, region in self._masked.items() if factor != 1 else ():
            _scale(local(self._parameters[name].detach()), region, factor)

    @torch.no_grad()
    def _correct_age(self, step: int, lr: float) -> None:
        """Replace, in younger parts, the update that the tensor's count of steps gave by what their own gives."""
        config, state = self._optimizer.config, self._optimizer.state()
        for name, parts in self._younger.items():
            young = [(step - born, region) for born, region in parts if max(config.betas) ** (step - born) >= _SAME_AGE]
            if not young:
                continue
            mean, square, count = (state[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq", "step"))
            done = _adam_update(local(mean), local(square), float(count), config.betas, config.eps)
            meant = done
            for age, region in young:
                own = _adam_update(local(mean), local(square), age, config.betas, config.eps)
                meant = torch.where(region, own, meant)
            rate = lr * self._optimizer.lr_scale.get(name, 1.0)
            local(self._parameters[name].detach()).sub_((meant - done).mul_(rate))


def _adam_update(mean: Tensor, square: Tensor, count: float, betas: tuple[float, float], eps: float) -> Tensor:
    """AdamW's direction after `count` steps (arXiv 1711.05101, algorithm 2)."""
    first, second = 1 - betas[0] ** count, 1 - betas[1] ** count
    return (mean / first) / ((square / second).sqrt() + eps)


def _younger(growing: Growing, name: str, parameter: Tensor) -> list[tuple[int, Tensor]]:
    """The step after which each part of a parameter was new, and where it is now; the oldest part first, a later one
    counts where both are. Nothing is older than the last growth that began the tensor, or its moments, anew."""
    found: list[tuple[int, Tensor]] = []
    since: list[tuple[GrowthPlan, str]] = []
    for plan, born in (*growing.earlier, (growing.plan, growing.grown_at))[::-1]:
        if plan.inserted(name) or plan.upcycled(name) or plan.moments == "reset":
            break
        sides = fresh_part(plan, name, closed=False)
        if sides is not None:
            for later, its_name in since[::-1]:
                sides = copied_part(later, its_name, sides)
            region = _region(parameter, sides)
            if region is not None:
                found.append((born, region))
        since.append((plan, name))
        name = plan.parent_of(name)
    return found[::-1]


def _region(parameter: Tensor, sides: tuple[Tensor, ...] | None) -> Tensor | None:
    """Where one of the sides says so, of this process's part of a parameter: bool, of a shape that broadcasts to it."""
    if sides is None:
        return None
    region = torch.zeros((), dtype=torch.bool)
    for place, side in enumerate(sides):
        if bool(side.any()):
            shape = [-1 if n == place else 1 for n in range(len(sides))]
            region = region | part_of(parameter, side.view(shape).expand(parameter.shape))
    return region.to(parameter.device) if bool(region.any()) else None


def _scale(values: Tensor, region: Tensor, factor: float) -> None:
    values.mul_(torch.where(region, factor, 1.0).to(values.dtype))
