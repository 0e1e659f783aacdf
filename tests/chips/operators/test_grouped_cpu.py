"""The CPU's own grouped products against fp64, one expert after the other."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from anychip.chips.compiling import find_compiler
from anychip.chips.operators import OperatorFallback, operators_for
from anychip.chips.operators.cpu import grouped
from anychip.chips.operators.cpu.library import RUNS_HERE

needs_units = pytest.mark.skipif(
    not RUNS_HERE or find_compiler() is None, reason="needs AVX-512 with bf16 products and a C++ compiler"
)
# counts, k, n: odd and empty experts, a width that fills no whole vector of words, panels and depths that repeat
CASES = [
    ([3, 0, 1, 16, 7], 32, 16),
    ([5, 64, 0], 48, 80),
    ([0, 0, 9], 400, 208),
    ([700, 31, 0, 2], 64, 224),
    ([0, 0], 16, 16),
]


def by_loop(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    parts = x.split(counts)
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


@needs_units
@pytest.mark.parametrize(("counts", "k", "n"), CASES, ids=str)
@pytest.mark.parametrize("stored", ["transposed", "as given"])
def test_results_and_gradients_are_those_of_fp64(counts: list[int], k: int, n: int, stored: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x, rows = normal(sum(counts), k).requires_grad_(), sum(counts)
    kept = (normal(len(counts), n, k) if stored == "transposed" else normal(len(counts), k, n)).requires_grad_()
    grad = normal(rows, n)

    def weights(of: Tensor) -> Tensor:
        return of.mT if stored == "transposed" else of

    out = grouped.grouped_matmul(x, weights(kept), torch.tensor(counts))
    found = (out, *torch.autograd.grad(out, (x, kept), grad))
    wide, wide_kept = x.detach().double().requires_grad_(), kept.detach().double().requires_grad_()
    expected = by_loop(wide, weights(wide_kept), counts)
    right = (expected, *torch.autograd.grad(expected, (wide, wide_kept), grad.double()))
    for mine, theirs in zip(found, right, strict=True):
        assert (mine.double() - theirs).norm() <= 4e-3 * theirs.norm()  # one rounding to bf16, sums in fp32


@needs_units
def test_it_is_proved_and_used_without_a_warning() -> None:
    operator = operators_for("cpu").grouped_matmul
    with warnings.catch_warnings():
        warnings.simplefilter("error", OperatorFallback)
        operator(torch.ones(4, 32).bfloat16(), torch.ones(2, 32, 48).bfloat16(), torch.tensor([1, 3]))


def test_what_it_is_not_made_for_runs_as_the_reference() -> None:
    x, weights = torch.randn(6, 10), torch.randn(2, 10, 7)
    torch.testing.assert_close(
        grouped.grouped_matmul(x, weights, torch.tensor([2, 4])), by_loop(x, weights, [2, 4]), rtol=1e-5, atol=1e-6
    )
