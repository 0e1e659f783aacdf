"""Optimizer state through growth: scaled as gradients are, in training that goes on as the small model would have."""

from __future__ import annotations

import torch
from growing import growth, random_state, small_model
from torch import Tensor

from anychip.grow.opening import Growing
from anychip.grow.plan import CLOSED, plan_growth
from anychip.grow.state import grow_state
from anychip.model.arithmetic import parameter_shapes
from anychip.model.decoder import Decoder
from anychip.recipe.schema import GrowthConfig, ModelConfig, OptimizerConfig
from anychip.train.optimizer import Optimizer


class Training:
    """A model in fp64 with its AdamW, on batches that follow from the step."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor], growing: Growing | None = None) -> None:
        self.model = Decoder(config, torch.float64).double()
        self.model.load_state_dict({name: state[f"model.{name}"] for name, _ in parameter_shapes(config)})
        parameters = dict(self.model.named_parameters())
        # eps scales as gradients do, and would differ between copies and their original
        optimizer = OptimizerConfig(lr=1e-3, eps=1e-30, weight_decay=0.0, betas=(0.9, 0.95))
        scale = growing.lr_scale() if growing else {}
        self.optimizer = Optimizer(parameters, optimizer, torch.float64, lr_scale=scale)
        for name, value in self.optimizer.state().items():
            value.copy_(state[f"optimizer.{name}"])
        self.parts = growing.bind(parameters, self.optimizer) if growing else None

    def step(self, number: int) -> float:
        chance = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 40, (4, 12), generator=chance)
        logits = self.model.logits(self.model(tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if self.parts:
            self.parts.scale_gradients(number)
            with self.parts.update(number, 1e-3):
                self.optimizer.step(1e-3)
        else:
            self.optimizer.step(1e-3)
        self.model.zero_grad()
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        named = {f"model.{name}": p.detach().clone() for name, p in self.model.named_parameters()}
        return named | {f"optimizer.{name}": value.clone() for name, value in self.optimizer.state().items()}


def new_training(config: ModelConfig) -> Training:
    state = random_state(config)
    return Training(config, {name: torch.zeros_like(v) if name[0] == "o" else v for name, v in state.items()})


def grown(small: Training, step: GrowthConfig, at: int) -> Training:
    plan = plan_growth(small.model.config, step, seed=1)
    return Training(plan.new, grow_state(plan, small.state()), Growing(plan, step, at))


TWICE = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48}


def test_exact_copies_with_mapped_moments_and_mup_rates_follow_the_small_model() -> None:
    """The sharpest test there is: without noise, 100 steps of AdamW differ by rounding only."""
    small = new_training(small_model())
    for number in range(1, 21):
        small.step(number)
    step = growth(**TWICE).model_copy(update={"noise": 0.0, "lr_rule": "mup"})
    large = grown(small, step, 20)
    gap = max(abs(small.step(number) - large.step(number)) for number in range(21, 121))
    assert gap < 1e-9


def test_moments_that_are_not_scaled_do_not_follow() -> None:
    small = new_training(small_model())
    for number in range(1, 21):
        small.step(number)
    step = growth(**TWICE).model_copy(update={"noise": 0.0, "lr_rule": "mup", "moments": "reset"})
    large = grown(small, step, 20)
    assert max(abs(small.step(number) - large.step(number)) for number in range(21, 41)) > 1e-4


def test_noise_makes_copies_separate() -> None:
    small = new_training(small_model())
    small.step(1)
    large = grown(small, growth(**TWICE), 1)
    for number in range(2, 30):
        large.step(number)
    gate = large.model.layers[0].mlp.gate_proj.weight
    assert (gate[:24] - gate[24:]).abs().max() > 1e-3


def test_young_parts_get_the_bias_correction_of_their_own_age() -> None:
    """A masked unit's moments started at 0 at growth: its first updates are as large as a new model's, lr each."""
    small = new_training(small_model())
    for number in range(1, 41):
        small.step(number)
    step = growth("masked", intermediate_size=40).model_copy(update={"open_steps": 1})
    large = grown(small, step, 40)
    up = large.model.layers[0].mlp.up_proj.weight
    large.step(41)  # opens; with c = 2^-64 there was no gradient yet
    before = up.detach().clone()
    large.step(42)
    moved = (up.detach() - before)[24:].abs()
    state = large.optimizer.state()
    mean, square = state["exp_avg.layers.0.mlp.up_proj.weight"], state["exp_avg_sq.layers.0.mlp.up_proj.weight"]
    meant = 1e-3 * (mean / (1 - 0.9**2)) / (square / (1 - 0.95**2)).sqrt()
    assert torch.allclose(moved, meant[24:].abs(), rtol=1e-9)


def test_masks_open_step_by_step_and_the_optimizer_sees_the_whole_weight() -> None:
    small = new_training(small_model())
    small.step(1)
    step = growth("masked", intermediate_size=40, hidden_size=24, num_attention_heads=6, num_key_value_heads=3,
                  num_hidden_layers=4).model_copy(update={"open_steps": 4})  # fmt: skip
    large = grown(small, step, 1)
    down = large.model.layers[0].mlp.down_proj.weight
    inner = [float(down.detach()[:16, 24:].abs().mean())]
    for number in range(2, 8):
        large.step(number)
        inner.append(float(down.detach()[:16, 24:].abs().mean()))
    whole = inner[4]
    assert inner[0] < 2 * CLOSED
    assert all(abs(value / whole - part) < 0.1 for value, part in zip(inner[1:4], (0.25, 0.5, 0.75), strict=True))
    assert abs(inner[5] / whole - 1) < 0.2  # open, it only learns


def test_parts_that_are_young_from_an_earlier_growth_keep_their_age_in_the_next() -> None:
    """Masked units at step 40, all doubled at step 43: the first are then three steps old, and so are their copies."""
    small = new_training(small_model())
    for number in range(1, 41):
        small.step(number)
    first = growth("masked", intermediate_size=40).model_copy(update={"open_steps": 1})
    middle = grown(small, first, 40)
    for number in range(41, 44):
        middle.step(number)
    second = growth(**{**TWICE, "intermediate_size": 80}).model_copy(update={"noise": 0.0})
    plans = plan_growth(small.model.config, first, 1), plan_growth(middle.model.config, second, 1)
    growing = Growing(plans[1], second, 43, ((plans[0], 40),))
    large = Training(plans[1].new, grow_state(plans[1], middle.state()), growing)
    up = large.model.layers[0].mlp.up_proj.weight
    before = up.detach().clone()
    large.step(44)
    moved = (before - up.detach()).detach()
    state = large.optimizer.state()
    mean, square = (state[f"{kind}.layers.0.mlp.up_proj.weight"] for kind in ("exp_avg", "exp_avg_sq"))
    young = torch.zeros(80, dtype=torch.bool)
    young[24:40] = young[64:80] = True
    for rows, age in ((young, 4), (~young, 44)):
        meant = 1e-3 * (mean / (1 - 0.9**age)) / (square / (1 - 0.95**age)).sqrt()
        torch.testing.assert_close(moved[rows], meant[rows], rtol=1e-8, atol=1e-18)
