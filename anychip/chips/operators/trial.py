"""Small inputs that show whether a vendor's operator computes what the reference computes.

A trial keeps what matters of a call (dtypes, device, sizes a kernel may depend on) and none of its numbers, so that
equal kinds of calls are one trial. Results are judged by the norm of their difference: single elements near zero may
be far off, relatively, in any 16-bit format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from anychip.chips.operators.plain_attention import attention_with_lse, visible_past

# Largest norm of the difference over the norm of the expected result. Chips may multiply fp32 in shorter formats.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_SEED = 20_250_115


class Trial(Protocol):
    """One kind of call: a named tuple, which is made and compared at every call in no time."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keywords on the CPU, in the dtypes of the call."""

    def __hash__(self) -> int: ...


class Draw:
    """Random numbers on the CPU, the same on every machine and chip."""

    def __init__(self) -> None:
        self._generator = Generator().manual_seed(_SEED)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self._generator)


def disagreement(name: str, trial: Trial, function: Callable[..., Any], reference: Callable[..., Any]) -> str | None:
    """Where the function's results or gradients differ from the reference's; None if nowhere."""
    args, keywords = trial.inputs(Draw())
    leaves = _DIFFERENTIABLE.get(name, ())
    found = _observe(function, moved(args, trial.device), moved(keywords, trial.device), leaves, trial.dtype)
    expected = _observe(reference, widened(args), widened(keywords), leaves, trial.dtype)
    limit = _TOLERANCE[trial.dtype]
    for what, right in expected.items():
        if what not in found or found[what].shape != right.shape:
            return f"its {what} has the wrong shape"
        difference = _relative_difference(found[what].to("cpu", torch.float64), right)
        if not difference <= limit:  # true for NaN
            return f"its {what} differs from the reference by {difference:.2g} of its norm, more than {limit:.2g}"
    return None


def _observe(
    function: Callable[..., Any],
    args: list[Any],
    keywords: dict[str, Any],
    differentiable: tuple[int, ...],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Everything a call gives: results (or, from a function without any, the arguments it changed) and gradients."""
    leaves = [args[position].requires_grad_() for position in differentiable]
    with torch.set_grad_enabled(bool(leaves)):
        returned = function(*args, **keywords)
    results = tensors_in(args if returned is None else returned)
    observed = {f"result {number}": result.detach() for number, result in enumerate(results)}
    if leaves:
        weights = Draw().normal(*results[0].shape, dtype=dtype).to(results[0])
        gradients = torch.autograd.grad(results[0], leaves, weights)
        observed.update({f"gradient {at}": g for at, g in zip(differentiable, gradients, strict=True)})
    return observed


def tensors_in(value: Any) -> list[Tensor]:
    """A tensor, or those of a sequence, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value or () for tensor in tensors_in(item)]


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same lists, tuples and dictionaries with their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return value


def moved(value: Any, device: torch.device) -> Any:
    """Copies on a device."""
    return mapped(value, lambda tensor: tensor.to(device, copy=True))


def widened(value: Any) -> Any:
    """Copies in fp64; whole numbers as they are."""
    return mapped(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.clone())


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    difference = torch.where(found == expected, 0.0, found - expected)  # infinities may agree
    size = torch.where(expected.isfinite(), expected, 0.0).norm()
    return (difference.norm() / size.clamp_min(1e-30)).item()


class AttentionTrial(NamedTuple):
    """Fewer keys than any kernel's block and an odd number of them, so that ends of blocks are tried too."""

    dtype: torch.dtype
    device: torch.device
    heads: int
    groups: int
    head_dim: int
    causal: bool
    masked: bool
    square: bool

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        return _attention_inputs(self, draw, blind_queries=0)


class AttentionWithLseTrial(AttentionTrial):
    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        return _attention_inputs(self, draw, blind_queries=2)


class AttentionBackwardTrial(AttentionTrial):
    """`out` and `lse` include a second block of keys, as they do in ring attention. Of the queries that see no key of
    the first block, one sees none of the second either."""

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        (q, k, v), keywords = _attention_inputs(self, draw, blind_queries=2)
        out, lse = attention_with_lse(q.double(), k.double(), v.double(), **keywords)
        more_k, more_v = (draw.normal(*k.shape, dtype=torch.float64) for _ in range(2))
        seen = torch.arange(q.shape[2])[:, None] >= int(self.masked)
        more_out, more_lse = attention_with_lse(
            q.double(), more_k, more_v, scale=keywords["scale"], causal=False, mask=seen
        )
        total = torch.logaddexp(lse, more_lse)
        share, more_share = ((part - total).exp().nan_to_num()[..., None] for part in (lse, more_lse))
        out = out * share + more_out * more_share
        grad_out = draw.normal(*q.shape, dtype=self.dtype)
        return [grad_out, q, k, v, out.to(self.dtype), total.float()], keywords


def _attention_inputs(trial: AttentionTrial, draw: Draw, blind_queries: int) -> tuple[list[Any], dict[str, Any]]:
    keys = 37
    queries = keys if trial.square else 21
    q = draw.normal(2, trial.heads, queries, trial.head_dim, dtype=trial.dtype)
    k = draw.normal(2, trial.groups, keys, trial.head_dim, dtype=trial.dtype)
    v = draw.normal(2, trial.groups, keys, trial.head_dim, dtype=trial.dtype)
    mask = None
    if trial.masked:
        mask = draw.integers(3, 2, 1, queries, keys) > 0
        past = visible_past(queries, keys, mask.device)
        mask |= past & ~past.tril(keys - queries - 1)  # every query sees its own token
        mask[:, :, :blind_queries] = False
    return [q, k, v], {"scale": trial.head_dim**-0.5, "causal": trial.causal, "mask": mask}


class RmsNormTrial(NamedTuple):
    """Some rows are so small that `eps` decides."""

    dtype: torch.dtype
    device: torch.device
    weight_dtype: torch.dtype
    size: int
    eps: float

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        x = draw.normal(2, 3, self.size, dtype=torch.float64)
        x[:, 0] *= self.eps**0.5
        weight = 1.0 + draw.normal(self.size, dtype=torch.float64) / 4
        return [x.to(self.dtype), weight.to(self.weight_dtype), self.eps], {}


class RotateTrial(NamedTuple):
    dtype: torch.dtype
    device: torch.device
    heads: int
    head_dim: int

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        x = draw.normal(2, 5, self.heads, self.head_dim, dtype=self.dtype)
        angles = draw.normal(5, self.head_dim // 2, dtype=torch.float64)
        return [x, angles.cos().float(), angles.sin().float()], {}


class SwigluTrial(NamedTuple):
    dtype: torch.dtype
    device: torch.device
    size: int

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        return [draw.normal(2, 3, self.size, dtype=self.dtype) for _ in range(2)], {}


class GroupedMatmulTrial(NamedTuple):
    """One expert without tokens is among the first, one at the end."""

    dtype: torch.dtype
    device: torch.device
    size_in: int
    size_out: int

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        counts = torch.tensor([5, 0, 16, 3, 0])
        x = draw.normal(int(counts.sum()), self.size_in, dtype=self.dtype)
        weights = draw.normal(len(counts), self.size_in, self.size_out, dtype=self.dtype)
        return [x, weights, counts], {}


class ExpertMlpTrial(NamedTuple):
    """Some experts idle, one choice left out."""

    dtype: torch.dtype
    device: torch.device
    weight_dtype: torch.dtype
    hidden: int
    inner: int

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        order, place, counts = _choices(draw)
        x = draw.normal(len(place) // 2, self.hidden, dtype=self.dtype)
        shapes = ((self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))
        weights = [draw.normal(len(counts), *s, dtype=torch.float64) / s[1] ** 0.5 for s in shapes]
        return [x, order, place, counts, *(w.to(self.weight_dtype) for w in weights)], {}


class CombineTrial(NamedTuple):
    dtype: torch.dtype
    device: torch.device
    size: int

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        order, place, _ = _choices(draw)
        weights = draw.normal(len(place) // 2, 2, dtype=torch.float32)
        return [draw.normal(len(order), self.size, dtype=self.dtype), weights, order, place], {}


def _choices(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """order, place, counts of 24 choices of 12 tokens among five experts, the first and last of which nobody chose."""
    chosen = 1 + draw.integers(3, 24)
    order = torch.sort(chosen, stable=True).indices[:-1]
    place = torch.full((24,), len(order))
    place[order] = torch.arange(len(order))
    return order, place, chosen[order].bincount(minlength=5)


class CrossEntropyTrial(NamedTuple):
    dtype: torch.dtype
    device: torch.device
    with_gradient: bool

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        logits, target = 4 * draw.normal(7, 301, dtype=torch.float64), draw.integers(301, 7)
        return [logits.to(self.dtype), target], {"with_gradient": self.with_gradient}


class AdamWTrial(NamedTuple):
    """A long step from small parameters, so that what is added to them shows."""

    dtype: torch.dtype
    device: torch.device

    def inputs(self, draw: Draw) -> tuple[list[Any], dict[str, Any]]:
        shapes = [(7, 5), (11,)]
        parameters, gradients, exp_avgs = ([draw.normal(*s, dtype=self.dtype) for s in shapes] for _ in range(3))
        exp_avg_sqs = [draw.normal(*s, dtype=self.dtype).square() for s in shapes]
        steps = [torch.tensor(3.0), torch.tensor(3.0)]
        keywords: dict[str, Any] = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
        return [parameters, gradients, exp_avgs, exp_avg_sqs, steps], keywords


def _of_attention(kind: type[AttentionTrial]) -> Callable[..., Trial]:
    def trial(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None) -> Trial:
        sizes = q.shape[1], k.shape[1], q.shape[3]
        return kind(q.dtype, q.device, *sizes, causal, mask is not None, q.shape[2] == k.shape[2])

    return trial


def _of_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **keywords: Any
) -> Trial:
    return _of_attention(AttentionBackwardTrial)(q, k, v, **keywords)


def _of_adamw(parameters: Sequence[Tensor], *others: Any, **keywords: Any) -> Trial:
    return AdamWTrial(parameters[0].dtype, parameters[0].device)


# Positions of the arguments that get gradients
_DIFFERENTIABLE: Mapping[str, tuple[int, ...]] = {
    "attention": (0, 1, 2),
    "rms_norm": (0, 1),
    "rotate": (0,),
    "swiglu": (0, 1),
    "grouped_matmul": (0, 1),
    "expert_mlp": (0, 4, 5, 6),
    "combine": (0, 1),
}
TRIALS: Mapping[str, Callable[..., Trial]] = {
    "attention": _of_attention(AttentionTrial),
    "attention_with_lse": _of_attention(AttentionWithLseTrial),
    "attention_backward": _of_attention_backward,
    "rms_norm": lambda x, weight, eps: RmsNormTrial(x.dtype, x.device, weight.dtype, x.shape[-1], eps),
    "rotate": lambda x, cos, sin: RotateTrial(x.dtype, x.device, x.shape[2], x.shape[3]),
    "swiglu": lambda gate, up: SwigluTrial(gate.dtype, gate.device, gate.shape[-1]),
    "grouped_matmul": lambda x, weights, counts: GroupedMatmulTrial(x.dtype, x.device, *weights.shape[1:]),
    "expert_mlp": lambda x, order, place, counts, gate, up, down: ExpertMlpTrial(
        x.dtype, x.device, gate.dtype, x.shape[1], gate.shape[1]
    ),
    "combine": lambda answers, weights, order, place: CombineTrial(answers.dtype, answers.device, answers.shape[1]),
    "cross_entropy": lambda logits, target, *, with_gradient: CrossEntropyTrial(
        logits.dtype, logits.device, with_gradient
    ),
    "adamw": _of_adamw,
}
