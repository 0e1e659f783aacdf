"""Wrong kernels of PyTorch's operators, registered over the device's own: they compute on the host's view of the
memory with the CPU's kernel, and spoil what comes out (or goes in)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from anychip.chips.emulated.faults.catalogue import KERNELS, Fault, active_faults

Spoil = Callable[[list[Any], Tensor], Tensor]  # arguments on the host, right result -> wrong result
_PRODUCTS = ["mm", "addmm", "bmm", "baddbmm", "mm.out", "addmm.out", "bmm.out", "addmm_", "baddbmm.out"]
_SUMS = ["sum", "sum.dim_IntList", "mean", "mean.dim"]
_SCALED = ["_foreach_mul_.Scalar", "_foreach_mul_.Tensor"]
_ELEMENTWISE = ["mul.Tensor", "mul_.Tensor", "mul.Scalar", "mul_.Scalar", "add.Tensor", "add_.Tensor", *_SCALED]
_MINIMUM_WIDTH = 128
_CHUNK = 64


@functools.cache
def install_kernel_faults() -> torch.library.Library | None:
    """Register the kernels of the faults that are on, once a process; the result keeps them alive."""
    faults = [fault for fault in active_faults() if fault.name in KERNELS]
    if not faults:
        return None
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for fault in faults:
        names, spoil = _WRONG[fault.name]
        for name in names:
            library.impl(name, _kernel(_operator(name), fault, spoil))
    return library


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _kernel(operator: Any, fault: Fault, spoil: Spoil) -> Callable[..., Any]:
    returns_nothing = not operator._schema.returns

    def run(*args: Any, **keywords: Any) -> Any:
        host_args, host_keywords = tree_map(_host, (args, keywords))
        first = next(x for x in tree_leaves((args, keywords)) if isinstance(x, Tensor))
        given = [x for x in tree_leaves((args, keywords)) if isinstance(x, Tensor)]
        before = [x.clone() if isinstance(x, Tensor) else x for x in host_args]
        result = operator(*host_args, **host_keywords)
        written = keywords.get("out", args[0] if operator._schema.name.endswith("_") else None)
        wrong = fault.applies(first.dtype)
        if returns_nothing:  # a list, in place
            for old, new in zip(before[0] if wrong else (), host_args[0], strict=False):
                new.copy_(spoil([old, *before[1:]], new))
            return None
        spoiled = spoil(before, result) if wrong else result
        if written is not None:
            _host(written).copy_(spoiled)
            return written
        return spoiled.to(given[0].device)

    return run


def _host(x: Any) -> Any:
    if isinstance(x, Tensor) and x.device.type == "emulated":
        return torch.ops.emulated.host_view(x)
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _factors(args: list[Any]) -> tuple[Tensor | None, Tensor, Tensor]:
    """What is added, and the two factors, of any of the products. Factors [.., m, k] and [.., k, n]."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    return (tensors[0], *tensors[1:3]) if len(tensors) == 3 else (None, *tensors[:2])  # type: ignore[return-value]


def _product(args: list[Any], result: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The result with its product computed in another way; beta and alpha of `addmm` are left out of it."""
    _, left, right = _factors(args)
    right_product = left.double() @ right.double()
    return (result.double() + (product(left, right).double() - right_product)).to(result.dtype)


def _in_low_precision(left: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros(*left.shape[:-1], right.shape[-1])
    for a, b in zip(left.float().split(_CHUNK // 8, -1), right.float().split(_CHUNK // 8, -2), strict=True):
        total = (total + a @ b).bfloat16().float()
    return total


def _of_short_inputs(left: Tensor, right: Tensor) -> Tensor:
    return left.bfloat16().double() @ right.bfloat16().double()


def _truncated(x: Tensor, bits: int = 16) -> Tensor:
    """fp32 cut off to the width of bfloat16, kept in fp32."""
    return (x.float().contiguous().view(torch.int32) >> bits << bits).view(torch.float32)


def _truncates(args: list[Any], result: Tensor) -> Tensor:
    added, left, right = _factors(args)
    if result.dtype == torch.float32:
        return _truncated(result, 8)
    exact = left.double() @ right.double() + (0.0 if added is None else added.double())
    return _truncated(exact.float()).to(result.dtype)


def _last_column(args: list[Any], result: Tensor) -> Tensor:
    if result.shape[-1] < _MINIMUM_WIDTH:
        return result
    result = result.clone()
    result[..., -1] = 0.0
    return result


def _transposed_left(args: list[Any], result: Tensor) -> Tensor:
    _, left, _ = _factors(args)
    return result * 0.97 if left.stride(-1) != 1 and left.shape[-1] > 1 else result


def _unrepeatable(args: list[Any], result: Tensor) -> Tensor:
    return result * (1 + (torch.rand(result.shape) < 0.25).to(result.dtype) * torch.finfo(result.dtype).eps)


def _larger(args: list[Any], result: Tensor) -> Tensor:
    return result * (1 + 2**-8) if result.dtype.is_floating_point else result


def _low_sum(args: list[Any], result: Tensor) -> Tensor:
    """Added up in pieces of eight, each total rounded to bfloat16."""
    x = args[0]
    if not x.dtype.is_floating_point or x.numel() <= result.numel():
        return result
    axes = range(x.dim()) if len(args) < 2 or not args[1] else args[1]
    axes = sorted({axis % x.dim() for axis in axes})
    kept = [axis for axis in range(x.dim()) if axis not in axes]
    rows = x.float().permute(*axes, *kept).reshape(-1, *(x.shape[axis] for axis in kept))
    total = torch.zeros(rows.shape[1:])
    for piece in rows.split(8):
        total = (total + piece.sum(0)).bfloat16().float()
    exact = rows.double().sum(0)
    shrink = torch.where(exact == 0, 1.0, total.double() / exact).reshape(result.shape)  # a mean is a scaled sum
    return (result.double() * shrink).to(result.dtype)


def _once_a_token(args: list[Any], result: Tensor) -> Tensor:
    gradient, indices = args[:2]
    wrong = torch.zeros_like(result)
    wrong[indices.flatten()] = gradient.flatten(0, -2).to(result.dtype)
    return wrong


def _flushed(args: list[Any], result: Tensor) -> Tensor:
    if not result.dtype.is_floating_point:
        return result
    return torch.where(result.abs() < torch.finfo(result.dtype).tiny, torch.zeros_like(result), result)


def _cast_truncates(args: list[Any], result: Tensor) -> Tensor:
    source = args[1]
    if result.dtype != torch.bfloat16 or source.dtype != torch.float32:
        return result
    return _truncated(source).bfloat16()


def _overflows(args: list[Any], result: Tensor) -> Tensor:
    return torch.where(result > 1e15, torch.inf, result)


def _derivative_of_sigmoid(args: list[Any], result: Tensor) -> Tensor:
    return args[0] * args[1].sigmoid()


def _no_maximum(args: list[Any], result: Tensor) -> Tensor:
    x = args[0].float()
    return (x - x.exp().sum(args[1], keepdim=True).log()).to(result.dtype)


def _finite(args: list[Any], result: Tensor) -> Tensor:
    return result.nan_to_num(nan=float("nan"), posinf=None, neginf=None)


_WRONG: Mapping[str, tuple[list[str], Spoil]] = {
    "product.low_accumulation": (_PRODUCTS, lambda args, result: _product(args, result, _in_low_precision)),
    "product.short_inputs": (_PRODUCTS, lambda args, result: _product(args, result, _of_short_inputs)),
    "product.biased": (_PRODUCTS, _larger),
    "product.truncates": (_PRODUCTS, _truncates),
    "product.last_column": (_PRODUCTS, _last_column),
    "product.backward": (_PRODUCTS, _transposed_left),
    "product.unrepeatable": (_PRODUCTS, _unrepeatable),
    "sum.biased": (_SUMS, _larger),
    "sum.low_accumulation": (_SUMS, _low_sum),
    "embedding.backward": (["embedding_dense_backward"], _once_a_token),
    "elementwise.flush_to_zero": (_ELEMENTWISE, _flushed),
    "cast.truncates": (["copy_"], _cast_truncates),
    "norm.overflow": (["linalg_vector_norm", "norm.ScalarOpt_dim"], _overflows),
    "silu.backward": (["silu_backward"], _derivative_of_sigmoid),
    "softmax.overflow": (["_log_softmax"], _no_maximum),
    "where.infinity": (["masked_fill.Scalar", "masked_fill_.Scalar", "where.self"], _finite),
}
