"""Inputs that break careless kernels: large, tiny, below the smallest normal number, cancelling, constant, infinite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators.trial import Draw
from anychip.verify.probe.cases import (
    Arguments,
    Case,
    adamw_case,
    attention_case,
    clip_case,
    gradient_norm_case,
    loss_case,
    norm_case,
    product_case,
    qkv,
    swiglu_case,
)
from anychip.verify.probe.shapes import Shapes


def awkward_cases(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    """In one dtype; those of the optimizer in float32 only."""
    yield from _attention(shapes, dtype)
    yield from _norms(shapes, dtype)
    # exp(60) and its like: the sigmoid is 0 or 1 to the last bit, and no intermediate may overflow
    yield swiglu_case(shapes, dtype, "large gates", 20.0, 1.0)
    yield swiglu_case(shapes, dtype, "tiny gates", 2.0**-10, 1.0)
    yield from _products(shapes, dtype)
    yield from _losses(shapes, dtype)
    yield from _below_normal(dtype)
    if dtype == torch.float32:
        yield adamw_case("tiny gradients", 1e-12, 400.0)
        yield adamw_case("large gradients", 1e8, 20.0)
        yield gradient_norm_case("large gradients", 1e16)
    else:
        yield Case("cast", "ties, ends and specials", dtype, lambda draw: ([_ties(dtype)], {}), 1,
                   function=lambda x: x.to(dtype), exact=True)  # fmt: skip


def _attention(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    scale = shapes.head_dim**-0.5
    keywords: dict[str, Any] = {"scale": scale, "causal": True, "mask": None}

    def sharp(draw: Draw) -> Arguments:
        q, k, v = qkv(shapes, draw, dtype)
        return [(q * 8).to(dtype), k, v], keywords

    def equal_keys(draw: Draw) -> Arguments:
        """All keys alike: every share is 1 / n. Values of one sign, so that rounding errors of one sign add up (arXiv
        2510.04212)."""
        q, k, v = qkv(shapes, draw, dtype)
        return [q, k[:, :, :1].expand_as(k).contiguous(), (-v.abs() - 1).to(dtype)], keywords

    def nearly_hidden(draw: Draw) -> Arguments:
        """A mask that leaves a query its own token and little else."""
        arguments: list[Any] = list(qkv(shapes, draw, dtype))
        mask = draw.integers(16, shapes.rows, 1, shapes.tokens, shapes.tokens) == 0
        return arguments, {**keywords, "mask": mask | torch.eye(shapes.tokens, dtype=torch.bool)}

    yield attention_case(shapes, dtype, "sharp scores", sharp, slack=8.0)
    alike = attention_case(shapes, dtype, "equal keys, values of one sign", equal_keys, slack=2.0)
    yield replace(alike, differentiable=())  # the exact gradient of q is zero
    yield attention_case(shapes, dtype, "nearly everything hidden", nearly_hidden)


def _norms(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    size = (shapes.rows, shapes.tokens, shapes.hidden)

    def sized(draw: Draw, factor: float) -> Tensor:
        return (factor * draw.normal(*size, dtype=torch.float64)).to(dtype)

    def outlier(draw: Draw) -> Tensor:
        x = draw.normal(*size, dtype=torch.float64)
        x[..., 3] *= 300
        return x.to(dtype)

    def constant(draw: Draw) -> Tensor:
        return draw.normal(*size[:2], 1, dtype=dtype).expand(size).contiguous()

    yield norm_case(shapes, dtype, "large", partial(sized, factor=1e4 if dtype != torch.float16 else 1e3))
    yield norm_case(shapes, dtype, "so small that eps decides", partial(sized, factor=shapes.eps**0.5 / 2))
    yield norm_case(shapes, dtype, "one large channel", outlier)
    yield norm_case(shapes, dtype, "constant rows", constant)
    wide = replace(shapes, hidden=max(shapes.hidden, 1024))  # what is off in a row as a whole shows in long rows

    def many_sizes(draw: Draw) -> Tensor:
        """From 1/16 to 16, evenly on a logarithmic scale, so that mean squares are rounded in all ways."""
        sizes = 2.0 ** (draw.integers(1025, *size[:2], 1).double() / 128 - 4)
        return (sizes * draw.normal(*size[:2], wide.hidden, dtype=torch.float64)).to(dtype)

    yield replace(norm_case(wide, dtype, "rows of many sizes", many_sizes), one_factor=True)


def _products(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    size = (128, max(shapes.hidden, 2048))  # long sums even of a small model

    def positive(draw: Draw, tokens: int, width: int) -> Tensor:
        """A sum that grows with every term: an accumulator that is too short stops growing."""
        return draw.normal(shapes.rows, tokens, width, dtype=torch.float64).abs().to(dtype)

    def scaled(draw: Draw, tokens: int, width: int, *, factor: float) -> Tensor:
        return (factor * draw.normal(shapes.rows, tokens, width, dtype=torch.float64)).to(dtype)

    extreme = 2.0**12 if dtype == torch.float16 else 2.0**60
    yield product_case(shapes, dtype, "factors of one sign", size, positive)
    yield product_case(shapes, dtype, "large factors", size, partial(scaled, factor=extreme))
    yield product_case(shapes, dtype, "tiny factors", size, partial(scaled, factor=2.0**-10))

    def cancelling(draw: Draw) -> Arguments:
        half = draw.normal(64, shapes.hidden, dtype=dtype)
        weight = draw.normal(shapes.hidden, 48, dtype=dtype)
        tail = draw.normal(64, 8, dtype=dtype)
        return [torch.cat((half, -half, tail), 1), torch.cat((weight, weight, weight[:8]))], {}

    def terms(args: list[Any]) -> float:
        """What the result would be if nothing cancelled."""
        left, right = args
        return float(left.norm() * right.norm()) / (2 * shapes.hidden) ** 0.5

    yield Case("product", "cancelling terms", dtype, cancelling, 2 * shapes.hidden, function=torch.mm, size=terms)
    yield Case("sum", "of ones", dtype, lambda draw: ([torch.ones(5000, 8, dtype=dtype)], {}), 5000,
               function=lambda x: x.sum(0))  # fmt: skip


def _losses(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    size = (64, shapes.vocabulary)

    def masked(draw: Draw) -> Tensor:
        """-inf as `masked_fill` writes it."""
        hidden = draw.integers(2, *size) == 0
        hidden[:, 0] = False
        return draw.normal(*size, dtype=dtype).masked_fill(hidden, -torch.inf)

    def large(draw: Draw) -> Tensor:
        return (100 * draw.normal(*size, dtype=torch.float64)).to(dtype)

    def hidden_scores(draw: Draw) -> Arguments:
        return [draw.normal(64, 64, dtype=dtype), draw.integers(2, 64, 64) == 0], {}

    def mask(x: Tensor, hidden: Tensor) -> Tensor:
        return x.masked_fill(hidden, -torch.inf)

    yield loss_case(shapes, dtype, "large logits", large)
    yield loss_case(shapes, dtype, "equal logits", lambda draw: torch.full(size, 3.0, dtype=dtype))
    yield loss_case(shapes, dtype, "half of them -inf", masked)
    yield Case("mask", "-inf", dtype, hidden_scores, 1, function=mask, exact=True)


def _below_normal(dtype: torch.dtype) -> Iterator[Case]:
    """Sums and products that end below the smallest normal number. IEEE 754 keeps them."""
    smallest = torch.finfo(dtype).tiny

    def pair(draw: Draw) -> Arguments:
        x = (1 + draw.normal(64, 64, dtype=torch.float64).abs()) * smallest
        return [x.to(dtype), (-0.75 * x).to(dtype)], {}

    yield Case("residual", "below the smallest normal number", dtype, pair, 1, function=torch.add, exact=True)
    if dtype == torch.float32:
        yield clip_case("below the smallest normal number", lambda draw: pair(draw)[0][0])


def _ties(dtype: torch.dtype) -> Tensor:
    """float32 numbers halfway between two of `dtype`, beside them, and those that have no neighbour."""
    step = torch.finfo(dtype).eps
    grid = 1 + step * torch.arange(0, 64, dtype=torch.float64) / 2
    beside = [grid, grid * (1 + 2.0**-20), grid * (1 - 2.0**-20), -grid]
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    return torch.cat([*(x.float() for x in beside), ends.float()])
