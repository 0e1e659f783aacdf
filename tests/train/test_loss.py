"""The chunked head and loss equal the plain ones, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from anychip.chips.operators.prepared import packs_bf16
from anychip.train.loss import IGNORE_INDEX, head_cross_entropy, head_token_losses


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("ignored", [0, 13])
def test_value_and_gradients_equal_fp64(chunk: int, ignored: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 12, generator=generator).requires_grad_()
    weight = torch.randn(33, 12, generator=generator).requires_grad_()
    labels = torch.randint(0, 33, (50,), generator=generator)
    labels[:ignored] = IGNORE_INDEX
    loss = head_cross_entropy(hidden, weight, labels, chunk)
    (loss * 0.25).backward()
    wide_hidden, wide_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = F.cross_entropy(wide_hidden @ wide_weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    (expected * 0.25).backward()
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), wide_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=1e-4, atol=1e-5)


def test_bf16_stays_near_fp32() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 32, generator=generator)
    weight = torch.randn(100, 32, generator=generator).requires_grad_()
    labels = torch.randint(0, 100, (64,), generator=generator)
    narrow = head_cross_entropy(hidden.bfloat16().requires_grad_(), weight, labels, 16)
    narrow.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    wide = F.cross_entropy(hidden @ weight.detach().t(), labels, reduction="sum")
    assert abs(narrow.item() / wide.item() - 1) < 0.01


def test_a_very_unlikely_label_costs_its_logit_difference_and_not_infinity() -> None:
    hidden = torch.tensor([[1000.0, 0.0]])
    loss = head_cross_entropy(hidden, torch.eye(2), torch.tensor([1]), 8)
    assert loss.item() == pytest.approx(1000.0)


def test_losses_of_single_tokens_keep_the_fp32_sums_of_bf16_products() -> None:
    """Logits near 20 would be 1/8 apart in bf16."""
    generator = torch.Generator().manual_seed(2)
    hidden = (4 * torch.randn(40, 32, generator=generator)).bfloat16()
    weight = torch.randn(100, 32, generator=generator).bfloat16().float()
    labels = torch.randint(0, 100, (40,), generator=generator)
    found = head_token_losses(hidden, weight, labels, 16)
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="none")
    rounded = F.cross_entropy((hidden @ weight.bfloat16().t()).double(), labels, reduction="none")
    assert found.dtype == torch.float32
    if not packs_bf16(hidden.device):
        pytest.skip("this chip has no bf16 product with an fp32 result")
    assert (found.double() - exact).abs().max() < 2e-5 < 1e-2 < (rounded - exact).abs().max()
