"""The names of faults, and which of them are on: `attention.grad_k` or `product.short_inputs:float32`, by commas.

With a dtype a fault shows only in calls whose first tensor has it. Faults of operators that vendors write kernels for
are faults of the vendor's version: the reference beside it is right. The others have nothing beside them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from anychip.errors import InputError

VARIABLE = "ANYCHIP_EMULATED_FAULTS"
DTYPES = ("float32", "bfloat16", "float16")

OPERATORS: Mapping[str, str] = {
    "attention.scale": "scores are 3 % too large",
    "attention.grad_q": "the gradient of queries is halved",
    "attention.grad_k": "keys from the 129th on get no gradient",
    "attention.grad_v": "the gradient of values is 1.6 % too large",
    "attention.causal": "a query sees the token behind it",
    "attention.mask": "a mask is not looked at",
    "attention.heads": "queries share the wrong key heads",
    "attention.long": "keys from the 129th on are not seen by later queries",
    "attention.low_accumulation": "the sum over keys is kept in bfloat16",
    "attention.unrepeatable": "the last bits change from run to run",
    "attention_with_lse.base": "the log-sum-exp is to the base 2",
    "attention_backward.grad_k": "the gradient of keys lacks the scale",
    "rms_norm.eps": "eps is not added",
    "rms_norm.grad_x": "the gradient lacks the norm's own part",
    "rms_norm.grad_weight": "the gradient of weights is summed in bfloat16",
    "rms_norm.low_precision": "the mean square is rounded to bfloat16",
    "rotate.pairs": "neighbours are turned together instead of halves",
    "rotate.backward": "backward turns forward",
    "swiglu.grad_gate": "the derivative is the sigmoid's alone",
    "swiglu.grad_up": "the gradient of `up` is 1.6 % too large",
    "swiglu.saturates": "gates above 8 count as 8",
    "grouped_matmul.last_expert": "rows of the last expert are multiplied by the first one's matrix",
    "grouped_matmul.grad_weights": "gradients of experts' matrices are halved",
    "cross_entropy.overflow": "exponentials are taken without subtracting the maximum",
    "cross_entropy.gradient": "the target's one is not subtracted",
    "adamw.bias_correction": "moments are not corrected for their start",
    "adamw.coupled_decay": "weight decay is added to the gradient",
}
KERNELS: Mapping[str, str] = {
    "product.low_accumulation": "sums of products are kept in bfloat16",
    "product.short_inputs": "factors are rounded to bfloat16, whatever their dtype",
    "product.biased": "results are 0.4 % too large",
    "product.truncates": "results are cut off, not rounded",
    "product.last_column": "the last column of a wide result is zero",
    "product.backward": "products with a transposed left factor are 3 % too small",
    "product.unrepeatable": "the last bits change from run to run",
    "sum.biased": "sums are 0.4 % too large",
    "sum.low_accumulation": "sums are kept in bfloat16",
    "embedding.backward": "a token that occurs twice gets one gradient",
    "elementwise.flush_to_zero": "sums and products below the smallest normal number become zero",
    "cast.truncates": "casts to a shorter format cut off instead of rounding",
    "norm.overflow": "squares in norms overflow early",
    "silu.backward": "its derivative is the sigmoid's alone",
    "softmax.overflow": "exponentials are taken without subtracting the maximum",
    "where.infinity": "masking writes the largest finite number for infinity",
}
COLLECTIVES: Mapping[str, str] = {
    "all_reduce.last_rank": "the last rank's part is left out",
    "all_reduce.low_accumulation": "the sum is kept in bfloat16",
    "all_reduce.biased": "sums are 0.4 % too large",
    "all_reduce.max": "the largest is the sum",
    "reduce_scatter.order": "each rank gets its neighbour's part",
    "all_gather.order": "parts arrive in reverse order",
}
ALL: Mapping[str, str] = {**OPERATORS, **KERNELS, **COLLECTIVES}


@dataclass(frozen=True)
class Fault:
    """One fault that is on; `dtype` as torch spells it, None for all."""

    name: str
    dtype: str | None = None

    @property
    def target(self) -> str:
        return self.name.partition(".")[0]

    def applies(self, dtype: object) -> bool:
        """Whether it shows in a call of this torch.dtype."""
        return self.dtype is None or str(dtype) == f"torch.{self.dtype}"


def active_faults() -> tuple[Fault, ...]:
    """Those that the environment turns on. Raises InputError for a name that is not known."""
    return tuple(_parse(item.strip()) for item in os.environ.get(VARIABLE, "").split(",") if item.strip())


def _parse(item: str) -> Fault:
    name, has_dtype, dtype = item.partition(":")
    if name not in ALL or (has_dtype and dtype not in DTYPES):
        raise InputError(
            f"does not know {item!r}.",
            where=VARIABLE,
            do=f"It takes, by commas, and with :DTYPE ({', '.join(DTYPES)}) if you like: {', '.join(ALL)}.",
        )
    return Fault(name, dtype or None)
