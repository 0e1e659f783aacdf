"""What a set of operators is: names, shapes, dtypes. Every implementation keeps to this, whatever the chip.

Shapes: b batch, s query tokens, t key tokens, n query heads, kv key/value heads (n is a multiple of kv), d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Attention(Protocol):
    """softmax(q k^T * scale) v, differentiable in q, k and v (arXiv 1706.03762; shared key heads 2305.13245)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Tensor:
        """q [b, n, s, d], k and v [b, kv, t, d] -> [b, n, s, d] in q's dtype.

        causal: the last query sees every key, each one before it one key fewer (s <= t). mask: bool of two or
        four dimensions, broadcastable to [b, n, s, t], True = visible; with causal both must allow. Every query must
        see a key.
        """


class AttentionWithLse(Protocol):
    """Attention of one block of keys, with what is needed to merge it with other blocks. Not differentiable."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `Attention` -> (out [b, n, s, d], log-sum-exp of the scaled scores [b, n, s] in fp32).

        A query that sees no key has out 0 and log-sum-exp -inf.
        """


class AttentionBackward(Protocol):
    """Gradients of attention to one block of keys, where `out` and `lse` are those of all blocks together."""

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """grad_out, out [b, n, s, d], lse [b, n, s] fp32 -> gradients of q, k and v in their dtypes."""


class RmsNorm(Protocol):
    """x / rms(x) * weight (arXiv 1910.07467), differentiable in both."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., h], weight [h] fp32 -> [..., h] in x's dtype; computed in fp32."""


class Rotate(Protocol):
    """Rotary positions, rotate-half (arXiv 2104.09864), differentiable in x."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [b, s, heads, d], cos and sin [s, d / 2] fp32 -> x's shape and dtype; computed in fp32."""


class Swiglu(Protocol):
    """silu(gate) * up (arXiv 2002.05202), differentiable in both."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up [..., f] -> [..., f] in their dtype."""


class GroupedMatmul(Protocol):
    """Rows multiplied by their expert's matrix, differentiable in x and weights."""

    def __call__(self, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """x [tokens, k] sorted by expert, weights [experts, k, n] of x's dtype, counts [experts] int64 -> [tokens, n].

        The first counts[0] rows belong to expert 0, and so on; a count may be 0, their sum is `tokens`.
        """


class ExpertMlp(Protocol):
    """Each chosen expert's SwiGLU MLP for each token, from gathering to the last product, differentiable in x and the
    three weights. For 16-bit tokens; a chip's own or none: a model gathers rows and calls `grouped_matmul` then."""

    def __call__(
        self, x: Tensor, order: Tensor, place: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        """x [t, h]; order int64 [n]: the choices (k a token) in the order of experts, those of no expert here left out;
        place int64 [t * k]: where each choice is in that order, n for none; counts int64 [e]: choices of each expert,
        n in all; gate, up [e, f, h], down [e, h, f] of x's dtype or fp32 -> answers [n, h] in x's dtype."""


class Combine(Protocol):
    """Each token's answers, weighed and added up; differentiable in answers and weights."""

    def __call__(self, answers: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        """answers [n, h], weights [t, k] fp32 or wider, order and place as in `ExpertMlp` -> [t, h] in the answers'
        dtype, added up in that of the weights."""


class CrossEntropy(Protocol):
    """Cross-entropy of a chunk of logits and its gradient at once. Not differentiable: the head's loss calls it."""

    def __call__(self, logits: Tensor, target: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """logits [tokens, vocab], target [tokens] int64 -> (losses in nats [tokens] fp32, softmax minus one-hot
        [tokens, vocab] fp32 or None). May overwrite fp32 logits."""


class AdamW(Protocol):
    """One step of AdamW (arXiv 1711.05101) in place, over many tensors at once."""

    def __call__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """All fp32 on one device; steps are scalars, counted up by one."""


@dataclass(frozen=True)
class Operators:
    """The operators of one chip: its own where they proved right, else the reference."""

    attention: Attention
    attention_with_lse: AttentionWithLse
    attention_backward: AttentionBackward
    rms_norm: RmsNorm
    rotate: Rotate
    swiglu: Swiglu
    grouped_matmul: GroupedMatmul
    combine: Combine
    cross_entropy: CrossEntropy
    adamw: AdamW
    expert_mlp: ExpertMlp | None = None
