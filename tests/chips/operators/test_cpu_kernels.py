"""Our own CPU kernels against fp64, where the CPU has the instructions; elsewhere the reference runs unseen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from operator_calls import largest_difference, make_calls, results
from torch import Tensor

from anychip.chips.compiling import find_compiler
from anychip.chips.operators import OperatorFallback, Operators, operators_for, prepared, reference
from anychip.chips.operators.cpu import attention as attention_module
from anychip.chips.operators.cpu import library
from anychip.chips.operators.prepared import packed_product, wide_product

needs_kernels = pytest.mark.skipif(
    not library.RUNS_HERE or find_compiler() is None, reason="needs AVX-512 with bf16 and a C++ compiler"
)
ATTENTION = [name for name in make_calls(torch.float32) if name.startswith(("attention", "with lse", "backward"))]


def draw(queries: int, keys: int, heads: int, groups: int, size: int) -> list[Tensor]:
    """q, k, v in the memory order of a model: [batch, tokens, heads, size] seen as [batch, heads, tokens, size]."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    return [torch.randn(2, s, n, size, generator=generator).bfloat16().transpose(1, 2) for s, n in shapes]


def differences(inputs: list[Tensor], causal: bool, mask: Tensor | None) -> list[float]:
    """Result and three gradients against fp64, as a share of their norm."""
    found, exact = [], []
    for operators, dtype, outcome in (
        (operators_for("cpu"), torch.bfloat16, found),
        (reference, torch.float64, exact),
    ):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = operators.attention(*leaves, scale=0.2, causal=causal, mask=mask)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
        outcome += [out, *torch.autograd.grad(out, leaves, weight)]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@needs_kernels
@pytest.mark.parametrize("name", ATTENTION)
def test_every_kind_of_attention_is_that_of_fp64(name: str) -> None:
    operators = operators_for("cpu")
    call = make_calls(torch.bfloat16)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", OperatorFallback)
        found = results(operators, call)
    assert largest_difference(found, results(reference, call, lambda x: x.double())) < 1.2e-2


def norms(operators: Operators, dtype: torch.dtype, shape: tuple[int, ...], turned: bool = False) -> list[Tensor]:
    """A norm and its gradients; `turned`: of rows that do not lie one behind the other."""
    generator = torch.Generator().manual_seed(shape[-1])
    x, grad = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    weight = torch.rand(shape[-1], generator=generator)
    if turned:
        x, grad = x.transpose(0, 1), grad.transpose(0, 1)
    leaves = [x.to(dtype).requires_grad_(), weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()]
    y = operators.rms_norm(*leaves, 1e-5)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 768), (70, 77), (3, 33, 160), (2, 5, 15)])
def test_norms_and_their_gradients_are_those_of_fp64(shape: tuple[int, ...]) -> None:
    for turned in (False, len(shape) == 3):
        pairs = zip(
            norms(operators_for("cpu"), torch.bfloat16, shape, turned),
            norms(reference, torch.float64, shape, turned),
            strict=True,
        )
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
        assert max(errors[:2]) < 2.0**-8 and errors[2] < 1e-6, (errors, turned)


@needs_kernels
def test_a_row_is_normed_alike_in_any_company() -> None:
    operators = operators_for("cpu")
    x, weight = torch.randn(300, 768).bfloat16(), torch.rand(768)
    together = operators.rms_norm(x, weight, 1e-5)
    assert all(torch.equal(operators.rms_norm(x[n : n + 1], weight, 1e-5)[0], together[n]) for n in (0, 7, 299))
    assert torch.equal(operators.rms_norm(x, weight.requires_grad_(), 1e-5), together)


@needs_kernels
@pytest.mark.parametrize("size", [16, 48, 64, 80, 128])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (64, 64), (77, 77), (130, 130), (33, 201)])
def test_sizes_that_do_not_fill_blocks(queries: int, keys: int, size: int) -> None:
    for causal in (True, False):
        assert max(differences(draw(queries, keys, 4, 2, size), causal, None)) < 6e-3


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (2, 1)], ids=["all alike", "of each batch element"])
def test_masks_are_those_of_the_contract(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(*shape, 50, 50, generator=generator) < 0.5
    mask |= torch.eye(50, dtype=torch.bool)
    for given in (mask, mask.mT.contiguous().mT):
        assert max(differences(draw(50, 50, 4, 4, 32), True, given)) < 6e-3
    assert max(differences(draw(50, 50, 4, 4, 32), False, mask[0, 0])) < 6e-3


@needs_kernels
def test_gradients_are_closer_to_fp64_than_the_reference() -> None:
    inputs = draw(512, 512, 4, 2, 48)
    ours = differences(inputs, True, None)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = reference.attention(*leaves, scale=0.2, causal=True, mask=None)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    plain = torch.autograd.grad(out, leaves, weight.bfloat16())
    wide = [x.double().detach().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(reference.attention(*wide, scale=0.2, causal=True, mask=None), wide, weight)
    theirs = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(plain, exact, strict=True)]
    assert all(one <= 1.1 * other for one, other in zip(ours[1:], theirs, strict=True))


@needs_kernels
def test_results_do_not_depend_on_threads() -> None:
    inputs, threads = draw(200, 200, 4, 2, 64), torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = operators_for("cpu").attention(*leaves, scale=0.2, causal=True, mask=None)
            outcomes.append([out, *torch.autograd.grad(out.sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@needs_kernels
def test_what_is_not_a_number_stays_none() -> None:
    q, k, v = draw(64, 64, 2, 2, 32)
    q[0, 0, 5, 3] = torch.nan
    out = operators_for("cpu").attention(q, k, v, scale=0.2, causal=True, mask=None)
    assert out[0, 0, 5].isnan().all() and out[0, 1].isfinite().all() and out[0, 0, :5].isfinite().all()


def test_other_inputs_are_the_references(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is compiled for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load.cache_clear()
    operators = operators_for("cpu")
    for dtype, queries, size in ((torch.float32, 32, 32), (torch.bfloat16, 32, 24)):
        q, k, v = (x.to(dtype) for x in draw(queries, 32, 2, 2, size))
        with warnings.catch_warnings():
            warnings.simplefilter("error", OperatorFallback)
            found = operators.attention(q, k, v, scale=0.2, causal=True, mask=None)
        assert torch.equal(found, reference.attention(q, k, v, scale=0.2, causal=True, mask=None))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not library.RUNS_HERE, reason="needs AVX-512 with bf16")
def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library.load.cache_clear()
    q, k, v = draw(32, 32, 2, 2, 32)
    try:
        with pytest.warns(OperatorFallback, match=r"needs a C\+\+ compiler"):
            found = operators_for("cpu").attention(q, k, v, scale=0.2, causal=True, mask=None)
    finally:
        library.load.cache_clear()
    assert torch.equal(found, reference.attention(q, k, v, scale=0.2, causal=True, mask=None))


@needs_kernels
def test_compiled_code_holds_the_kernel_once_it_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    operators, inputs = operators_for("cpu"), draw(64, 64, 4, 2, 32)

    def outcome(attend: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return operators.attention(q, k, v, scale=0.2, causal=True, mask=None)

    expected = outcome(plain)
    called = []
    forward = attention_module.load().attention_forward
    fake = SimpleNamespace(
        attention_forward=lambda *args: (called.append(1), forward(*args)),
        attention_backward=attention_module.load().attention_backward,
    )
    monkeypatch.setattr(attention_module, "load", lambda: fake)
    found = outcome(torch.compile(plain, backend="aot_eager", fullgraph=True))
    assert called
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernels
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (1, 2), (150, 77), (257, 768)])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_products_are_those_of_fp64_rounded_once(outputs: int, inputs: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    bias = torch.randn(outputs, generator=generator).bfloat16() if biased else None
    product = packed_product(weight, bias)
    x = torch.randn(14, inputs, generator=generator).bfloat16()
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    found = product(x)
    # half a unit of bf16 in the result, and what fp32 loses by adding up
    limit = exact.abs() * 2.0**-8 + 1e-6 * (x.double().abs() @ weight.double().abs().t())
    assert ((found.double() - exact).abs() <= limit).all()
    for rows in range(1, 14):  # a row has the same bits in any company
        assert torch.equal(product(x[:rows]), found[:rows])
    assert torch.equal(product(x[3:9]), found[3:9])


@needs_kernels
def test_a_wide_product_is_the_packed_one_before_it_is_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = (torch.randn(rows, 77, generator=generator).bfloat16() for rows in (150, 9))
    found = wide_product(weight)(x)
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16(), packed_product(weight, None)(x))
    exact = x.double() @ weight.double().t()
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_wide_product_without_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "packs_bf16", lambda device: False)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        weight, x = torch.ones(4, 8, dtype=dtype), torch.full((2, 8), 0.5, dtype=dtype)
        found = wide_product(weight)(x)
        assert found.dtype == expected and torch.equal(found, torch.full((2, 4), 4.0, dtype=expected))


@needs_kernels
def test_a_packed_product_that_is_wrong_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert prepared.packs_bf16(device)
    prepared._proved.cache_clear()
    monkeypatch.setattr(prepared, "packed_product", lambda weight, bias: lambda x: x @ weight.t())  # forgets the bias
    with pytest.warns(OperatorFallback, match="differs from the reference"):
        assert not prepared.packs_bf16(device)
    prepared._proved.cache_clear()
