"""The plain operators against fp64, against PyTorch's own forms, and attention in blocks against attention at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from operator_calls import largest_difference, make_calls, results
from torch import Tensor

from anychip.chips.operators import Operators, blocked_attention, reference
from anychip.chips.operators.plain_attention import visible_past

CALLS = sorted(make_calls(torch.float32))
BLOCKED = replace(
    reference,
    attention_with_lse=blocked_attention.attention_with_lse,
    attention_backward=blocked_attention.attention_backward,
)
either_attention = pytest.mark.parametrize("operators", [reference, BLOCKED], ids=["kernel", "blocked"])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_results_and_gradients_are_those_of_fp64(name: str, dtype: torch.dtype, limit: float) -> None:
    call = make_calls(dtype)[name]
    exact = results(reference, call, lambda x: x.double())
    assert largest_difference(results(reference, call), exact) < limit


@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith(("with lse", "backward"))])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_plain_blocks_give_what_the_kernel_gives(name: str, dtype: torch.dtype, limit: float) -> None:
    call = make_calls(dtype)[name]
    assert largest_difference(results(BLOCKED, call), results(reference, call, lambda x: x.double())) < limit


@pytest.mark.parametrize("name", [n for n in CALLS if make_calls(torch.float32)[n].gradients_of])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    call = make_calls(torch.float64)[name]
    function = getattr(reference, call.operator)
    fixed = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call.args]

    def of_leaves(*leaves: Tensor) -> Tensor:
        args = list(fixed)
        for position, leaf in zip(call.gradients_of, leaves, strict=True):
            args[position] = leaf
        return function(*args, **call.keywords)

    leaves = [fixed[position].clone().requires_grad_() for position in call.gradients_of]
    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["rms_norm", "rotate"])
def test_bf16_is_rounded_once(name: str) -> None:
    call = make_calls(torch.bfloat16)[name]
    found, exact = results(reference, call)[0], results(reference, call, lambda x: x.double())[0]
    assert (found == exact.bfloat16()).float().mean() > 0.98


def test_plain_forms() -> None:
    calls = make_calls(torch.float64)
    x, weight, eps = calls["rms_norm"].args
    torch.testing.assert_close(
        reference.rms_norm(x, weight, eps), F.rms_norm(x, (24,), weight.double(), eps), rtol=1e-12, atol=1e-12
    )
    x, cos, sin = calls["rotate"].args
    turned = (
        torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.complex(cos, sin).to(torch.complex128)[:, None]
    )
    torch.testing.assert_close(reference.rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    x, weights, counts = calls["grouped_matmul"].args
    expert = torch.arange(4).repeat_interleave(counts)
    torch.testing.assert_close(reference.grouped_matmul(x, weights, counts), (x[:, None] @ weights[expert])[:, 0])
    logits, target = calls["cross_entropy"].args
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target, reduction="none")
    losses, gradient = reference.cross_entropy(logits, target, with_gradient=True)
    assert gradient is not None
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])
    assert reference.cross_entropy(logits, target, with_gradient=False)[1] is None


@either_attention
@pytest.mark.parametrize("queries", [1, 5, 8])
def test_causal_attention_aligns_the_last_query_with_the_last_key(queries: int, operators: Operators) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 4, generator=generator) for _ in range(3))
    whole = reference.attention(q, k, v, scale=0.5, causal=True, mask=None)
    tail = q[:, :, 8 - queries :]
    torch.testing.assert_close(
        reference.attention(tail, k, v, scale=0.5, causal=True, mask=None), whole[:, :, -queries:]
    )
    out, _ = operators.attention_with_lse(tail, k, v, scale=0.5, causal=True, mask=None)
    torch.testing.assert_close(out, whole[:, :, -queries:])


@either_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_keys_add_up_to_attention_and_its_gradients(
    dtype: torch.dtype, masked: bool, operators: Operators
) -> None:
    """What ring attention does: two blocks of keys, merged by their log-sum-exp; gradients from the merged result."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, grad_out = (torch.randn(2, h, 600, 8, generator=generator).to(dtype) for h in (4, 2, 2, 4))
    mask = torch.rand(2, 1, 600, 600, generator=generator) > 0.4
    mask |= torch.eye(600, dtype=torch.bool)
    seen = mask if masked else torch.ones(600, 600, dtype=torch.bool)
    halves = [(slice(0, 256), seen[..., :256]), (slice(256, 600), seen[..., 256:])]
    parts = [
        operators.attention_with_lse(
            q, k[:, :, keys], v[:, :, keys], scale=0.4, causal=False, mask=m if masked else None
        )
        for keys, m in halves
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    assert lse.dtype == dtype
    out = sum((o * (part - lse).exp()[..., None] for o, part in parts), torch.zeros(()))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference.attention(*leaves, scale=0.4, causal=False, mask=mask if masked else None)
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out, expected, **tolerance)
    blocks = [
        operators.attention_backward(
            grad_out, q, k[:, :, keys], v[:, :, keys], out, lse, scale=0.4, causal=False, mask=m if masked else None
        )
        for keys, m in halves
    ]
    found = blocks[0][0] + blocks[1][0], *(torch.cat(pair, 2) for pair in list(zip(*blocks, strict=True))[1:])
    for one, other in zip(found, torch.autograd.grad(expected, leaves, grad_out), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@either_attention
def test_causal_in_blocks_of_queries_and_keys(operators: Operators) -> None:
    """More queries than are scored at a time, cached keys before them."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, s, 4, generator=generator) for h, s in ((2, 700), (1, 720), (1, 720)))
    keywords = {"scale": 0.5, "causal": True, "mask": None}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference.attention(*leaves, **keywords)
    out, lse = operators.attention_with_lse(q, k, v, **keywords)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    found = operators.attention_backward(torch.ones_like(q), q, k, v, out, lse, **keywords)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@either_attention
def test_a_query_that_sees_no_key_adds_nothing(operators: Operators) -> None:
    q = torch.randn(1, 2, 3, 4)
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
    out, lse = operators.attention_with_lse(q, q, q, scale=0.5, causal=False, mask=mask)
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()
    grads = operators.attention_backward(torch.ones_like(q), q, q, q, out, lse, scale=0.5, causal=False, mask=mask)
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][:, :, 1] == 0).all()


@either_attention
@pytest.mark.parametrize("shape", [(1, 9), (7, 9), (2, 1, 1, 9), (1, 4, 7, 9)])
def test_masks_of_every_shape(shape: tuple[int, ...], operators: Operators) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, h, s, 4, generator=generator) for h, s in ((4, 7), (2, 9), (2, 9)))
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[..., 0] = True
    whole = {"scale": 0.5, "causal": False, "mask": mask.expand(2, 4, 7, 9)}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference.attention(*leaves, **whole)
    keywords = {**whole, "mask": mask}
    torch.testing.assert_close(operators.attention(q, k, v, **keywords), expected)
    out, lse = operators.attention_with_lse(q, k, v, **keywords)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    found = operators.attention_backward(torch.ones_like(q), q, k, v, out, lse, **keywords)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_visible_past_counts_from_the_end() -> None:
    assert visible_past(2, 4, torch.device("cpu")).tolist() == [[True] * 3 + [False], [True] * 4]


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(50, 30, generator=generator), torch.randn(700, generator=generator)]
    state = [
        [x.clone() for x in parameters],
        [torch.zeros_like(x) for x in parameters],
        [torch.zeros_like(x) for x in parameters],
    ]
    steps = [torch.zeros(()), torch.zeros(())]
    leaves = [x.clone().requires_grad_() for x in parameters]
    theirs = torch.optim.AdamW(leaves, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, fused=True)
    for _ in range(3):
        gradients = [torch.randn(x.shape, generator=generator) for x in parameters]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient.clone()
        theirs.step()
        reference.adamw(
            state[0], gradients, state[1], state[2], steps, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2
        )
    assert all(torch.equal(a, b) for a, b in zip(state[0], leaves, strict=True))
    assert [s.item() for s in steps] == [3.0, 3.0]
