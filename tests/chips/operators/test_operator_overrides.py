"""Vendors' overrides, with stand-ins for their modules: are arguments converted by the vendor's conventions, is every
difference from the reference found, and is every failure one warning and the reference?"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_npu import fake_npu, npu_fusion_attention, npu_rms_norm
from operator_calls import largest_difference, make_calls, results
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from anychip.chips.operators import OperatorFallback, Operators, operators_for, reference
from anychip.chips.operators.registry import OPERATORS, OVERRIDES
from anychip.errors import InputError

CALLS = sorted(make_calls(torch.float32))


def ascend(monkeypatch: pytest.MonkeyPatch, profile: dict[str, str] | None = None, **replacements: Any) -> Operators:
    monkeypatch.setitem(sys.modules, "torch_npu", fake_npu(**replacements))
    return operators_for("ascend", profile)


def fake_mlu_ops() -> ModuleType:
    """`torch_mlu_ops` in plain torch; like the real one it knows no gradients and may write into its input."""
    module = ModuleType("torch_mlu_ops")

    @torch.no_grad()
    def fused_rms_norm(
        x: Tensor, residual: None, gamma: Tensor, beta: None, bias: None, eps: float, *rest: Any
    ) -> Tensor:
        assert x.dim() == 2 and x.dtype == gamma.dtype and rest == (False, None)
        return F.rms_norm(x, gamma.shape, gamma, eps)

    @torch.no_grad()
    def apply_rotary(x: Tensor, sin: Tensor, cos: Tensor, *rest: Any) -> Tensor:
        assert rest == (None, None, False, False, False, x.shape[1]) and sin.shape == (x.shape[1], x.shape[3])
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1) * sin[:, None]
        return x.mul_(cos[:, None]).add_(turned)

    @torch.no_grad()
    def active(x: Tensor, *, act_mode: str, is_gated: bool) -> Tensor:
        assert x.dim() == 2 and act_mode == "silu" and is_gated
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    for function in (fused_rms_norm, apply_rotary, active):
        setattr(module, function.__name__, function)
    return module


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-6), (torch.bfloat16, 1.2e-2)])
def test_ascend_gives_what_the_reference_gives(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, limit: float
) -> None:
    call = make_calls(dtype)[name]
    exact = results(reference, call, lambda x: x.double())
    operators = ascend(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert largest_difference(results(operators, call), exact) < limit
    assert getattr(operators, call.operator).fallback_reason is None


@pytest.mark.parametrize("name", ["rms_norm", "rotate", "swiglu"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_cambricon_gives_what_the_reference_gives(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, limit: float
) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlu_ops", fake_mlu_ops())
    operators = operators_for("cambricon")
    call = make_calls(dtype)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert largest_difference(results(operators, call), results(reference, call, lambda x: x.double())) < limit
        with torch.inference_mode():
            before = call.args[0].clone()
            assert getattr(operators, name)(*call.args).shape == before.shape
            assert torch.equal(call.args[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_torch_itself(dtype: torch.dtype) -> None:
    operators, call = operators_for("mthreads"), make_calls(dtype)["grouped_matmul"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert largest_difference(results(operators, call), results(reference, call)) < 1e-2


@pytest.mark.parametrize("vendor", ["nvidia", "ascend"])
def test_fused_adamw_is_tried_and_used(monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    operators, tensors = operators_for(vendor), [[torch.ones(3)] for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operators.adamw(*tensors, [torch.zeros(())], lr=0.5, betas=(0.9, 0.9), eps=0.0, weight_decay=0.0)
    assert tensors[0][0].tolist() == pytest.approx([1 - 0.5 * 10 / 10**0.5] * 3, rel=1e-5)


def no_kernel(*args: Any, **keywords: Any) -> None:
    raise RuntimeError("no kernel for this chip\nand a long trace of the runtime")


class _TwiceTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def wrong_backward(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    normed, rstd = npu_rms_norm(input, gamma, epsilon)
    return _TwiceTheGradient.apply(normed), rstd


def no_backward(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return npu_rms_norm(input, gamma, epsilon)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (None, "the module has no npu_rms_norm"),
        (no_kernel, r"RuntimeError in the first call: no kernel for this chip$"),
        (wrong_backward, "its gradient 0 differs from the reference by 1 of its norm"),
        (no_backward, "does not require grad"),
        (lambda x, gamma, epsilon: npu_rms_norm(x, gamma, 1e-6), "its result 0 differs"),
        (lambda x, gamma, epsilon: (npu_rms_norm(x, gamma, epsilon)[0][..., :1],), "its result 0 has the wrong shape"),
        (lambda x, gamma, epsilon: (npu_rms_norm(x, gamma, epsilon)[0] * torch.nan,), "its result 0 differs"),
    ],
    ids=["missing", "raises", "wrong backward", "no backward", "ignores eps", "wrong shape", "not a number"],
)
def test_what_is_wrong_is_said_once_and_the_reference_takes_over(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any] | None, reason: str
) -> None:
    operators, call = ascend(monkeypatch, npu_rms_norm=function), make_calls(torch.float32)["rms_norm"]
    expected = results(reference, call)
    with pytest.warns(OperatorFallback, match=f"operator rms_norm .* by torch_npu: .*{reason}") as seen:
        assert largest_difference(results(operators, call), expected) == 0
        assert largest_difference(results(operators, call), expected) == 0
    assert len(seen) == 1
    assert (
        largest_difference(
            results(operators, make_calls(torch.float32)["swiglu"]),
            results(reference, make_calls(torch.float32)["swiglu"]),
        )
        < 1e-6
    )
    with pytest.warns(OperatorFallback):  # another object knows nothing of it
        results(operators_for("ascend"), call)


def shifted(*args: Any, sparse_mode: int = 0, **keywords: Any) -> Any:
    """Causal at the first key, as many kernels have it: right only for equal lengths."""
    if sparse_mode == 3:
        q, k = args[:2]
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return npu_fusion_attention(*args, **{**keywords, "atten_mask": hidden}, sparse_mode=1)
    return npu_fusion_attention(*args, sparse_mode=sparse_mode, **keywords)


def inverted(*args: Any, atten_mask: Tensor | None = None, sparse_mode: int = 0, **keywords: Any) -> Any:
    if sparse_mode == 1 and atten_mask is not None:
        atten_mask = ~atten_mask
    return npu_fusion_attention(*args, atten_mask=atten_mask, sparse_mode=sparse_mode, **keywords)


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [(shifted, "causal", "causal, cached keys"), (inverted, "causal", "documents")],
    ids=["causal at the first key", "mask the other way round"],
)
@pytest.mark.parametrize("operator", ["attention", "with lse"])
def test_every_kind_of_attention_is_tried(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any], right: str, wrong: str, operator: str
) -> None:
    operators, calls = ascend(monkeypatch, npu_fusion_attention=kernel), make_calls(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(operators, calls[f"{operator}, {right}"])
    with pytest.warns(OperatorFallback, match="differs"):
        found = results(operators, calls[f"{operator}, {wrong}"])
    assert largest_difference(found, results(reference, calls[f"{operator}, {wrong}"])) == 0


def test_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    reason = r"operator swiglu .* torch_npu: the module cannot be imported \(import of torch_npu"
    with pytest.warns(OperatorFallback, match=reason):
        results(operators_for("ascend"), make_calls(torch.float32)["swiglu"])


def test_nothing_is_imported_or_tried_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    operators = ascend(
        monkeypatch, npu_swiglu=lambda x, dim: calls.append("swiglu") or F.silu(x.chunk(2, dim)[0]) * x.chunk(2, dim)[1]
    )
    meta = torch.empty(3, 4, device="meta")
    assert operators.swiglu(meta, meta).device.type == "meta"
    assert calls == []
    gate = torch.randn(3, 4)
    operators.swiglu(gate, gate)
    operators.swiglu(gate, gate)
    assert len(calls) == 3, "one trial and two calls"


def test_a_profile_switches_single_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = ascend(monkeypatch, {"rms_norm": "reference", "rotate": "vendor"})
    assert operators.rms_norm is reference.rms_norm
    assert operators.rotate is not reference.rotate and operators.swiglu is not reference.swiglu
    for profile in ({"rms_nrom": "reference"}, {"rms_norm": "fast"}):
        with pytest.raises(InputError, match="not a choice of operator") as caught:
            operators_for("ascend", profile)
        assert "rms_norm" in str(caught.value) and "reference" in str(caught.value)


@pytest.mark.parametrize("vendor", ["emulated", "someone else"])
def test_a_vendor_without_kernels_has_the_reference(vendor: str) -> None:
    assert operators_for(vendor) == reference


def test_a_third_party_brings_its_own() -> None:
    from anychip.chips.operators import Override

    module = ModuleType("their_module")
    module.swish = lambda gate, up: F.silu(gate) * up  # type: ignore[attr-defined]
    sys.modules["their_module"] = module
    try:
        operators = operators_for(
            "theirs", overrides={"swiglu": Override("their_module", ("swish",), lambda m: m.swish)}
        )
        call = make_calls(torch.float32)["swiglu"]
        assert largest_difference(results(operators, call), results(reference, call)) == 0
        assert operators.rotate is reference.rotate
    finally:
        del sys.modules["their_module"]


def test_overrides_name_operators() -> None:
    for overrides in OVERRIDES.values():
        assert set(overrides) <= set(OPERATORS)


@pytest.mark.parametrize("selective", [False, True])
def test_the_first_call_may_be_inside_recomputation(monkeypatch: pytest.MonkeyPatch, selective: bool) -> None:
    """A trial must not be recorded as part of the model, nor expected when the layer is computed again."""
    operators = ascend(monkeypatch)
    q, k, v = (x.clone().requires_grad_() for x in make_calls(torch.float32)["attention, causal"].args)
    keep = (
        {"context_fn": lambda: create_selective_checkpoint_contexts([torch.ops.aten.bmm.default])} if selective else {}
    )

    def layer(q: Tensor, k: Tensor, v: Tensor, operators: Operators) -> Tensor:
        return operators.attention(operators.swiglu(q, q), k, v, scale=0.3, causal=True, mask=None)

    found = checkpoint(layer, q, k, v, operators, use_reentrant=False, **keep)
    grads = torch.autograd.grad(found.square().sum(), (q, k, v))
    expected = torch.autograd.grad(layer(q, k, v, reference).square().sum(), (q, k, v))
    assert largest_difference(list(grads), list(expected)) < 1e-5


def test_no_gradients_and_inference_mode_do_not_disturb_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_calls(torch.float32)["rms_norm"]
    for mode in (torch.no_grad, torch.inference_mode):
        operators = ascend(monkeypatch, npu_rms_norm=wrong_backward)
        with mode(), pytest.warns(OperatorFallback, match="gradient 0"):
            operators.rms_norm(*call.args)


def test_compiled_code_traces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = ascend(monkeypatch, npu_swiglu=no_kernel)
    gate, up = make_calls(torch.float32)["swiglu"].args
    compiled = torch.compile(lambda gate, up: operators.swiglu(gate, up), backend="eager", fullgraph=True)
    assert torch.equal(compiled(gate, up), reference.swiglu(gate, up))


def test_replacing_one_operator_keeps_the_others() -> None:
    mine = replace(reference, swiglu=lambda gate, up: gate)
    assert mine.rotate is reference.rotate
