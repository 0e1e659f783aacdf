"""What torch.autocast("emulated") casts: products to the lower precision, delicate functions to fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_KEY = "AutocastPrivateUse1"

# The operators that PyTorch casts on its own accelerators, as far as language models meet them.
_LOWER = (
    "conv1d conv2d conv3d addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul"
    " linalg_multi_dot prelu scaled_dot_product_attention"
)
_FP32 = (
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor"
    " pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm cosine_similarity nll_loss nll_loss2d kl_div"
    " l1_loss smooth_l1_loss huber_loss mse_loss soft_margin_loss binary_cross_entropy_with_logits dist logsumexp prod"
    " prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm sum sum.dim_IntList"
)
_WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"


@functools.cache
def register_rules() -> torch.library.Library:
    """Register them; the result keeps them alive."""
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, _KEY)
    library = torch.library.Library("aten", "IMPL")
    for names, dtype in ((_LOWER, _lower), (_FP32, _fp32), (_WIDEST, _widest)):
        for name in names.split():
            library.impl(name, _casting(_operator(name), dtype), _KEY)
    library._others = everything  # type: ignore[attr-defined]
    return library


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _casting(operator: Any, dtype: Callable[[list[Tensor]], torch.dtype]) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

    def run(*args: Any, **kwargs: Any) -> Any:
        floats = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _casts(x)]
        wanted = dtype(floats) if floats else None
        args, kwargs = tree_map(lambda x: x.to(wanted) if _casts(x) else x, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*args, **kwargs)

    return run


def _casts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "emulated" and x.is_floating_point() and x.dtype != torch.float64


def _lower(_: list[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype("emulated")


def _fp32(_: list[Tensor]) -> torch.dtype:
    return torch.float32


def _widest(floats: list[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in floats))
