"""A short training of a tiny model: hundreds of steps add up what single operators hide.

The mean loss of every 20 steps must lie in a band that was recorded on CPUs: eight trainings whose first weights differ
by rounding, in float32 and bfloat16. `python -m anychip.verify.probe.canary` records the bands again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anychip.chips.operators import Operators, reference
from anychip.data.batch import Batch
from anychip.model.init import init_tensor
from anychip.parallel.gradients import gradient_norm, scale_gradients
from anychip.parallel.layout import Layout
from anychip.parallel.processes import Processes
from anychip.recipe.schema import CheckpointConfig, LogConfig, ModelConfig, OptimizerConfig, ParallelConfig
from anychip.train.engine import Engine
from anychip.train.job import TrainingJob
from anychip.train.optimizer import Optimizer

STEPS, WINDOW = 240, 20
_BANDS = Path(__file__).with_name("canary_bands.json")
_MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_SEQ, _ROWS, _LR, _SEED = 48, 8, 3e-3, 11
_RECORDED, _NUDGE = 8, 1e-6
_SLACK, _SPREADS = 0.01, 3.0


@dataclass(frozen=True)
class CanaryResult:
    """Mean loss (nats a token) of each window beside its band; `problem` is empty when all lie inside."""

    losses: list[float]
    low: list[float]
    high: list[float]
    problem: str

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def run_canary(device: torch.device, dtype: torch.dtype, operators: Operators) -> CanaryResult:
    """Train on a device and compare with the band of the dtype (that of float32 for wider ones)."""
    bands = json.loads(_BANDS.read_text(encoding="utf-8"))
    band = bands["bfloat16" if dtype == torch.bfloat16 else "float32"]
    losses = window_losses(device, dtype, operators)
    for number, (loss, low, high) in enumerate(zip(losses, band["low"], band["high"], strict=True)):
        if not low <= loss <= high:  # true for NaN
            steps = f"{number * WINDOW + 1} to {(number + 1) * WINDOW}"
            problem = f"the mean loss of steps {steps} is {loss:.4f}, outside {low:.4f} to {high:.4f}"
            return CanaryResult(losses, band["low"], band["high"], problem)
    return CanaryResult(losses, band["low"], band["high"], "")


def window_losses(
    device: torch.device, dtype: torch.dtype, operators: Operators = reference, nudge: float = 0.0, seed: int = 0
) -> list[float]:
    """Mean loss of each WINDOW steps. `nudge`: relative change of the first weights, drawn from `seed`."""
    job = _job()
    processes = Processes(job.parallel, Layout(), 0, device)
    engine = Engine(job, processes, dtype, operators)
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in engine.parameters.items():
        first = init_tensor(name, tuple(parameter.shape), _MODEL, _SEED)
        parameter.detach().copy_(first * (1 + nudge * torch.randn(first.shape, generator=chance)))
    optimizer = Optimizer(engine.trainable, job.optimizer, dtype, operators)
    losses = []
    for step in range(STEPS):
        losses.append(float(engine.forward_backward(batch(step))))
        norm = float(gradient_norm(engine.parameters.values(), processes))
        scale_gradients(engine.parameters.values(), norm, job.optimizer.grad_clip)
        optimizer.step(_LR)
        for parameter in engine.parameters.values():
            parameter.grad = None
    return [sum(losses[start : start + WINDOW]) / WINDOW for start in range(0, STEPS, WINDOW)]


def batch(step: int) -> Batch:
    """Three of four tokens follow from the one before, with a coin's toss; the fourth repeats the one three before it,
    which takes attention. The least possible loss is 3/4 ln 2."""
    chance = torch.Generator().manual_seed(1_000_003 * _SEED + step)
    tokens = torch.randint(0, _MODEL.vocab_size, (_ROWS, _SEQ + 1), generator=chance)
    coins = torch.randint(0, 2, (_ROWS, _SEQ + 1), generator=chance)
    for place in range(3, _SEQ + 1):
        following = (tokens[:, place - 1] + 3 + 5 * coins[:, place]) % _MODEL.vocab_size
        tokens[:, place] = tokens[:, place - 3] if place % 4 == 3 else following
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _job() -> TrainingJob:
    return TrainingJob(
        title="canary",
        directory=Path(),
        model=_MODEL,
        source=_Batches(),
        initialize=lambda parameters: None,
        evaluate=None,
        identity="",
        steps=STEPS,
        seq_length=_SEQ,
        micro_batch_size=_ROWS,
        global_batch_size=_ROWS,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=_LR),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
    )


class _Batches:
    def batch(self, step: int) -> Batch:
        return batch(step)

    def documents(self, step: int) -> list[str]:
        return []


def record_bands() -> dict[str, dict[str, list[float]]]:
    """From this CPU: the range of _RECORDED trainings, widened by three times itself and 1 %."""
    bands = {}
    for dtype in (torch.float32, torch.bfloat16):
        runs = [window_losses(torch.device("cpu"), dtype, nudge=_NUDGE, seed=seed) for seed in range(_RECORDED)]
        lows, highs = (list(map(pick, zip(*runs, strict=True))) for pick in (min, max))
        room = [_SPREADS * (high - low) + _SLACK * high for low, high in zip(lows, highs, strict=True)]
        assert all(map(math.isfinite, room))
        bands[str(dtype).removeprefix("torch.")] = {
            "low": [round(low - r, 5) for low, r in zip(lows, room, strict=True)],
            "high": [round(high + r, 5) for high, r in zip(highs, room, strict=True)],
        }
    return bands


if __name__ == "__main__":
    from anychip.files import write_json

    write_json(_BANDS, record_bands())
