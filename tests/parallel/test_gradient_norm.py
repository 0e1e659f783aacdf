"""The norm of a gradient is right for large matrices too, and the same however a layout cuts them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anychip.parallel.gradients import gradient_norm
from anychip.parallel.layout import Layout
from anychip.parallel.processes import Processes
from anychip.recipe.schema import ParallelConfig


def test_the_norm_of_millions_of_numbers_is_exact_to_fp32() -> None:
    processes = Processes(ParallelConfig(), Layout(), 0, torch.device("cpu"))
    sizes = (6_000_001, 4096, 5, 0)
    gradients = [
        0.01 * torch.randn(size, generator=torch.Generator().manual_seed(number)) for number, size in enumerate(sizes)
    ]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    right = float(torch.cat(gradients).double().square().sum().sqrt())
    assert float(gradient_norm(parameters, processes)) == pytest.approx(right, rel=1e-7)
    halves = [nn.Parameter(torch.zeros_like(half)) for half in gradients[0].tensor_split(2)]
    for parameter, half in zip(halves, gradients[0].tensor_split(2), strict=True):
        parameter.grad = half
    assert float(gradient_norm([*halves, *parameters[1:]], processes)) == pytest.approx(right, rel=1e-7)
