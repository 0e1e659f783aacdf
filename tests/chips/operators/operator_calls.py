"""One call of every operator on random inputs, and its results with gradients, for comparing two implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import Operators, reference


@dataclass(frozen=True)
class Call:
    operator: str
    args: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    gradients_of: tuple[int, ...] = ()


def make_calls(dtype: torch.dtype) -> dict[str, Call]:
    """Calls by a readable name; heads are shared, lengths differ, one mask per batch row."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = normal(2, 4, 9, 16), normal(2, 2, 9, 16), normal(2, 2, 9, 16)
    longer_k, longer_v = normal(2, 2, 14, 16), normal(2, 2, 14, 16)
    documents = torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [1] * 7])
    mask = documents[:, None, :, None] == documents[:, None, None, :]
    angles = torch.randn(9, 8, generator=generator)
    counts = torch.tensor([0, 7, 2, 0])
    calls = {}
    for name, keys, values, causal, seen in (
        ("everything", k, v, False, None),
        ("causal", k, v, True, None),
        ("causal, cached keys", longer_k, longer_v, True, None),
        ("documents", k, v, False, mask),
        ("causal documents", k, v, True, mask),
        ("own heads", q.flip(1), q.flip(2), True, None),
    ):
        keywords = {"scale": 0.3, "causal": causal, "mask": seen}
        calls[f"attention, {name}"] = Call("attention", (q, keys, values), keywords, (0, 1, 2))
        calls[f"with lse, {name}"] = Call("attention_with_lse", (q, keys, values), keywords)
        out, lse = reference.attention_with_lse(q, keys, values, **keywords)
        args = (normal(*q.shape), q, keys, values, out, lse)
        calls[f"backward, {name}"] = Call("attention_backward", args, keywords)
    calls["rms_norm"] = Call("rms_norm", (normal(2, 9, 24), 1 + torch.randn(24, generator=generator), 1e-5), {}, (0, 1))
    calls["rotate"] = Call("rotate", (normal(2, 9, 4, 16), angles.cos(), angles.sin()), {}, (0,))
    calls["swiglu"] = Call("swiglu", (normal(2, 9, 24), normal(2, 9, 24)), {}, (0, 1))
    calls["grouped_matmul"] = Call("grouped_matmul", (normal(9, 16), normal(4, 16, 24), counts), {}, (0, 1))
    labels = torch.randint(0, 50, (9,), generator=generator)
    calls["cross_entropy"] = Call("cross_entropy", (normal(9, 50), labels), {"with_gradient": True})
    return calls


def results(operators: Operators, call: Call, change: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
    """Results and gradients, in fp64, after `change` was applied to every floating-point input."""
    args = [change(x.clone()) if isinstance(x, Tensor) and x.is_floating_point() else x for x in call.args]
    leaves = [args[position].requires_grad_() for position in call.gradients_of]
    returned = getattr(operators, call.operator)(*args, **call.keywords)
    found = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if x is not None]
    if leaves:
        weights = torch.linspace(-1, 1, found[0].numel()).view(found[0].shape).to(found[0].dtype)
        found += torch.autograd.grad(found[0], leaves, weights)
    return [x.detach().double() for x in found]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over norm, the largest of all results."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True))
