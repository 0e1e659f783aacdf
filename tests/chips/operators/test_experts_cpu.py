"""The CPU's own experts, combination of answers and cross-entropy against fp64 and against the plain operators."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from anychip.chips.compiling import find_compiler
from anychip.chips.operators import OperatorFallback, operators_for, plain, reference
from anychip.chips.operators.cpu import cross_entropy, experts
from anychip.chips.operators.cpu.library import RUNS_HERE
from anychip.model.experts import MixtureOfExperts
from anychip.model.remake import Remake
from anychip.recipe.schema import ModelConfig

needs_units = pytest.mark.skipif(
    not RUNS_HERE or find_compiler() is None, reason="needs AVX-512 with bf16 products and a C++ compiler"
)
# tokens, chosen a token, experts, hidden, inner: panels that repeat, an odd half of words, idle experts, one token
SIZES = [(37, 3, 6, 32, 48), (300, 2, 3, 272, 208), (5, 1, 9, 16, 16), (1, 2, 2, 48, 112), (700, 1, 2, 32, 16)]


def choices(tokens: int, k: int, count: int, left_out: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """order, place, counts; the last `left_out` choices in the order of experts are answered elsewhere."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(tokens)]).flatten()
    order = torch.sort(chosen, stable=True).indices[: tokens * k - left_out]
    place = torch.full((tokens * k,), len(order))
    place[order] = torch.arange(len(order))
    return order, place, chosen[order].bincount(minlength=count)


def close(found: list[Tensor], exact: list[Tensor], limit: float) -> None:
    for number, (mine, right) in enumerate(zip(found, exact, strict=True)):
        assert mine.shape == right.shape
        assert (mine.double() - right).norm() <= limit * right.norm() + 1e-12, number


@needs_units
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["masters", "bf16 weights"])
@pytest.mark.parametrize("left_out", [0, 1])
def test_experts_and_their_gradients_are_those_of_fp64(size: Any, dtype: torch.dtype, left_out: int) -> None:
    tokens, k, count, hidden, inner = size
    generator = torch.Generator().manual_seed(3)
    placed = choices(tokens, k, count, left_out)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, hidden).bfloat16()
    shapes = ((count, inner, hidden), (count, inner, hidden), (count, hidden, inner))
    weights = [(normal(*shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]
    grad = normal(len(placed[0]), hidden).bfloat16()

    def run(function: Any, wide: bool) -> list[Tensor]:
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, *weights)]
        out = function(leaves[0], *placed, *leaves[1:])
        return [out, *torch.autograd.grad(out, leaves, grad.double() if wide else grad)]

    found = run(experts.expert_mlp, False)
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [dtype] * 3
    close([t.detach() for t in found], [t.detach() for t in run(plain.expert_mlp, True)], 1e-2)
    idle = placed[2] == 0
    assert all(not gradient[idle].any() for gradient in found[2:])


@needs_units
@pytest.mark.parametrize("left_out", [0, 4])
def test_answers_are_weighed_and_added_up_as_in_fp64(left_out: int) -> None:
    order, place, _ = choices(50, 3, 7, left_out)
    generator = torch.Generator().manual_seed(1)
    answers = torch.randn(len(order), 48, generator=generator).bfloat16().requires_grad_()
    weights = torch.rand(50, 3, generator=generator).requires_grad_()
    grad = torch.randn(50, 48, generator=generator).bfloat16()
    out = experts.combine(answers, weights, order, place)
    found = [out.detach(), *torch.autograd.grad(out, (answers, weights), grad)]
    wide = [t.detach().double().requires_grad_() for t in (answers, weights)]
    right = plain.combine(wide[0], wide[1], order, place)
    close(found, [right.detach(), *torch.autograd.grad(right, wide, grad.double())], 4e-3)


@needs_units
@pytest.mark.parametrize("vocab", [1, 17, 64, 1003])
def test_cross_entropy_of_bf16_logits_is_that_of_fp64(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (6 * torch.randn(9, vocab + 3, generator=generator)).bfloat16()[:, :vocab]
    target = torch.randint(0, vocab, (9,), generator=generator)
    if vocab > 17:
        logits[0, 1:9] = -torch.inf
        target[0] = 0
    losses, gradient = cross_entropy.cross_entropy(logits, target, with_gradient=True)
    right_losses, right_gradient = plain.cross_entropy(logits.double(), target, with_gradient=True)
    assert gradient is not None and right_gradient is not None
    torch.testing.assert_close(losses.double(), right_losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=1e-5, atol=1e-7)
    assert cross_entropy.cross_entropy(logits, target, with_gradient=False)[1] is None


@needs_units
def test_cross_entropy_says_what_is_wrong() -> None:
    logits = torch.zeros(2, 16).bfloat16()
    logits[1, 3] = torch.nan
    losses, _ = cross_entropy.cross_entropy(logits, torch.tensor([1, 2]), with_gradient=False)
    assert losses[0].isfinite() and losses[1].isnan()
    with pytest.raises(IndexError, match="outside of the vocabulary of 16"):
        cross_entropy.cross_entropy(logits, torch.tensor([1, 16]), with_gradient=False)


MODEL = ModelConfig(
    family="telechat2-moe", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=48,
)  # fmt: skip


def gradients_of(layer: MixtureOfExperts, source: Tensor, remade: bool) -> dict[str, Tensor]:
    layer.zero_grad()
    leaf = source.clone().requires_grad_()
    x = leaf * 1
    out = layer(x, remake=Remake(lambda: leaf * 1) if remade else None, keep=not remade)
    out.float().square().sum().backward()
    assert leaf.grad is not None
    return {
        "out": out.detach(),
        "x": leaf.grad,
        **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None},
    }


@needs_units
def test_a_layer_of_a_model_uses_them_and_keeps_nothing_that_it_can_make_again() -> None:
    torch.manual_seed(0)
    ours, theirs = (MixtureOfExperts(MODEL, operators) for operators in (operators_for("cpu"), reference))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.1)
    theirs.load_state_dict(ours.state_dict())
    source = torch.randn(2, 40, 64).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error", OperatorFallback)
        found = gradients_of(ours, source, remade=False)
    again, plainly = gradients_of(ours, source, remade=True), gradients_of(theirs, source, remade=False)
    assert all(torch.equal(again[name], found[name]) for name in found)
    close(list(found.values()), [plainly[name].double() for name in found], 2e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@needs_units
def test_results_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    layer, source = MixtureOfExperts(MODEL, operators_for("cpu")), torch.randn(1, 90, 64).bfloat16()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.1)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outcomes.append(gradients_of(layer, source, remade=False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0] if name != "gate.weight")


def test_what_they_are_not_made_for_runs_as_the_reference() -> None:
    placed = choices(6, 2, 3)
    x, weights = torch.randn(6, 10), [torch.randn(3, *s) for s in ((7, 10), (7, 10), (10, 7))]
    right = plain.expert_mlp(x, *placed, *weights)
    torch.testing.assert_close(experts.expert_mlp(x, *placed, *weights), right)
    logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    torch.testing.assert_close(
        cross_entropy.cross_entropy(logits.clone(), target, with_gradient=True),
        plain.cross_entropy(logits.clone(), target, with_gradient=True),
    )
