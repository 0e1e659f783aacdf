"""Kernels of our own for CPUs that multiply bf16 (AVX-512 with VDPBF16PS), where PyTorch's are far from the machine's
limits. They are C++ in csrc/, compiled at first use; without a compiler, or on another CPU, the reference runs."""

from __future__ import annotations

from collections.abc import Mapping

from anychip.chips.operators.override import Override

_ATTENTION = "anychip.chips.operators.cpu.attention"

OVERRIDES: Mapping[str, Override] = {
    name: Override(_ATTENTION, (name,), lambda module, name=name: getattr(module, name), traceable=True)  # type: ignore[misc]
    for name in ("attention", "attention_with_lse", "attention_backward")
} | {
    name: Override(f"anychip.chips.operators.cpu.{module}", (name,), lambda module, name=name: getattr(module, name))  # type: ignore[misc]
    for name, module in (
        ("grouped_matmul", "grouped"),
        ("expert_mlp", "experts"),
        ("combine", "experts"),
        ("cross_entropy", "cross_entropy"),
        ("rms_norm", "rms_norm"),
    )
}
