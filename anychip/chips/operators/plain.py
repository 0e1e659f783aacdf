"""Every operator in plain PyTorch: what training on a CPU uses, and what every vendor's own version is checked with.

Accumulation, norms and softmax are in fp32, or in fp64 when the inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from anychip.chips.operators.contract import Operators
from anychip.chips.operators.plain_attention import attention, attention_backward, attention_with_lse
from anychip.chips.operators.plain_experts import Gather, combine, grouped_matmul


def wide(x: Tensor) -> Tensor:
    """x in fp32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and one number a row for backward: a third of the time and of the memory that recording every
    elementary step takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inner = wide(x)
        rstd = inner.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (inner * rstd).mul_(weight.to(inner.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        grad, normed, scale = wide(grad_outputs[0]), wide(x) * rstd, weight.to(rstd.dtype)
        aligned = grad * normed
        grad_weight = aligned.flatten(0, -2).sum(0)
        share = (aligned @ scale).unsqueeze(-1).div_(x.shape[-1])
        return (grad * scale).sub_(normed.mul_(share)).mul_(rstd).to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See contract.RmsNorm."""
    return _RmsNorm.apply(x, weight, eps)


class _Rotate(torch.autograd.Function):
    """Turns forward by the angles, backward by their opposites; keeps only the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_outputs[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = wide(x[..., :half]), wide(x[..., half:])
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = ((first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin))
    return torch.cat(turned, dim=-1).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See contract.Rotate."""
    return _Rotate.apply(x, cos, sin)


class _Swiglu(torch.autograd.Function):
    """Keeps gate and up; silu(gate) is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grad_outputs
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See contract.Swiglu."""
    return _Swiglu.apply(gate, up)


def expert_mlp(
    x: Tensor, order: Tensor, place: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """See contract.ExpertMlp."""

    def multiply(rows: Tensor, weights: Tensor) -> Tensor:
        return grouped_matmul(rows, weights.to(rows.dtype).mT, counts)

    rows: Tensor = Gather.apply(x, order, place)
    return multiply(swiglu(multiply(rows, gate), multiply(rows, up)), down)


def cross_entropy(logits: Tensor, target: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """See contract.CrossEntropy."""
    log_probabilities = torch.log_softmax(wide(logits), dim=-1)
    losses = -log_probabilities.gather(1, target[:, None]).squeeze(1)
    return losses, gradient_of_log_softmax(log_probabilities, target) if with_gradient else None


def gradient_of_log_softmax(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """Softmax minus one-hot, [tokens, vocab], in the place of the log-probabilities."""
    gradient = log_probabilities.exp_()
    return gradient.scatter_add_(1, target[:, None], gradient.new_full((), -1.0).expand(len(target), 1))


def adamw(
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
    """See contract.AdamW. PyTorch's fused step on a CPU, its loop over tensors elsewhere: not every chip has both."""
    state = parameters, gradients, exp_avgs, exp_avg_sqs, steps
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    _step_adamw(*state, fused=on_cpu, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def fused_adamw(
    *state: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """See contract.AdamW. PyTorch's fused step."""
    _step_adamw(*state, fused=True, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _step_adamw(
    *state: Sequence[Tensor], fused: bool, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    parameters, gradients, exp_avgs, exp_avg_sqs, steps = map(list, state)
    with torch.no_grad():
        torch_adamw(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
        )


reference = Operators(
    attention=attention,
    attention_with_lse=attention_with_lse,
    attention_backward=attention_backward,
    rms_norm=rms_norm,
    rotate=rotate,
    swiglu=swiglu,
    grouped_matmul=grouped_matmul,
    combine=combine,
    cross_entropy=cross_entropy,
    adamw=adamw,
)
