"""Finds tensors that stayed on the CPU while training runs on an accelerator."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Work that belongs on the accelerator; anything smaller (a batch being cut, a seeded draw) may be the CPU's.
_HEAVY = frozenset(
    (
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::mv", "aten::addmv"),
        *("aten::linear", "aten::convolution", "aten::_grouped_mm", "aten::native_layer_norm"),
        *("aten::embedding", "aten::embedding_dense_backward", "aten::_softmax", "aten::_log_softmax"),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::_fused_adamw_",
    )
)
_CROSSES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::set_", "aten::to")


class CpuTensorError(RuntimeError):
    """A tensor is on the CPU where the accelerator's work is done."""


class cpu_watch(TorchDispatchMode):
    """Inside, an operator that mixes the CPU with an accelerator, or does an accelerator's work on the CPU, raises
    CpuTensorError. Backward, which runs in threads of its own, is watched as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by on their own
        name = func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0]
        kinds = {x.device.type for x in tensors} - {"meta"}
        if "cpu" in kinds and name not in _CROSSES:
            shapes = ", ".join(f"{list(x.shape)} on {x.device}" for x in tensors)
            if len(kinds) > 1:
                raise CpuTensorError(f"{name} mixes the CPU with an accelerator: {shapes}")
            if name in _HEAVY:
                raise CpuTensorError(f"{name} runs on the CPU: {shapes}")
        return func(*args, **(kwargs or {}))
