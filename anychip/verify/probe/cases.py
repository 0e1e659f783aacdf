"""What a probe computes: every operator of a training step, forward and backward, with ordinary inputs.

Operators that vendors have kernels for are called as the contract says (chips/operators/contract.py); the others are
what the model, the loss and the optimizer make of PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.chips.operators.plain_attention import attention_with_lse
from anychip.chips.operators.trial import Draw
from anychip.model.remake import product
from anychip.train.loss import head_cross_entropy
from anychip.train.muon import orthogonalize
from anychip.verify.probe.shapes import Shapes

Arguments = tuple[list[Any], dict[str, Any]]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Case:
    """One operator with one kind of inputs.

    `make` draws the arguments on the CPU in their dtypes. `function` is the operator itself, or None for one of the
    contract, whose vendor's version and reference are both probed; `wrap` makes results of what a contract's operator
    changes in place. `length` and `roundings` are what judge.py reckons with, those of gradients apart. `exact`: the
    CPU's own bits are expected. `size`: what a result near zero is compared with. `one_factor`: see judge.flaw.
    """

    operator: str
    inputs: str
    dtype: torch.dtype
    make: Callable[[Draw], Arguments]
    length: int
    roundings: float = 1.0
    gradient_roundings: float = 2.0
    gradient_length: int = 0
    differentiable: tuple[tuple[int, str], ...] = ()
    function: Callable[..., Any] | None = None
    wrap: Wrap = lambda operator: operator
    results: tuple[str, ...] = ("result",)
    exact: bool = False
    size: Callable[[list[Any]], float] | None = None
    one_factor: bool = False

    @property
    def name(self) -> str:
        return f"{self.operator} {str(self.dtype).removeprefix('torch.')}, {self.inputs}"


def ordinary_cases(shapes: Shapes, dtype: torch.dtype, *, muon: bool) -> Iterator[Case]:
    """All operators in the dtype that products run in, or in float32, which the optimizer always uses."""
    yield from _attention(shapes, dtype)
    yield from _rows(shapes, dtype)
    yield from _products(shapes, dtype)
    yield from _loss(shapes, dtype)
    if dtype == torch.float32:
        yield from _optimizer(shapes)
    if muon:
        yield Case("muon", "normal", dtype, lambda draw: ([draw.normal(3, 96, 64, dtype=dtype)], {}), 96, 30.0, 30.0,
                   function=orthogonalize)  # fmt: skip


QKV = ((0, "q"), (1, "k"), (2, "v"))


def qkv(shapes: Shapes, draw: Draw, dtype: torch.dtype, queries: int | None = None) -> list[Tensor]:
    """q [b, n, s, d], k and v [b, kv, t, d]."""
    heads = (shapes.heads, shapes.key_heads, shapes.key_heads)
    lengths = (queries or shapes.tokens, shapes.tokens, shapes.tokens)
    return [draw.normal(shapes.rows, n, t, shapes.head_dim, dtype=dtype) for n, t in zip(heads, lengths, strict=True)]


def documents_mask(draw: Draw, shapes: Shapes) -> Tensor:
    """[b, 1, s, s] bool: three documents a row."""
    number = draw.integers(3, shapes.rows, shapes.tokens).sort(dim=1).values
    return (number[:, :, None] == number[:, None, :])[:, None]


def attention_case(
    shapes: Shapes, dtype: torch.dtype, inputs: str, make: Callable[[Draw], Arguments], slack: float = 1.0
) -> Case:
    summed = _summed_backward(shapes)
    return Case("attention", inputs, dtype, make, shapes.tokens, 2.0 * slack, 6.0 * slack, summed, QKV)


def _summed_backward(shapes: Shapes) -> int:
    """Gradients of queries and keys are sums over keys of differences of sums over head_dim that nearly cancel: terms
    are counted eight times, which allows not quite three times the error."""
    return 8 * (shapes.tokens + shapes.head_dim)


def _attention(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    scale = shapes.head_dim**-0.5

    def whole(draw: Draw, *, causal: bool, masked: bool, queries: int | None = None) -> Arguments:
        mask = documents_mask(draw, shapes) if masked else None
        return [*qkv(shapes, draw, dtype, queries)], {"scale": scale, "causal": causal, "mask": mask}

    yield attention_case(shapes, dtype, "causal", partial(whole, causal=True, masked=False))
    yield attention_case(shapes, dtype, "inside documents", partial(whole, causal=True, masked=True))
    yield attention_case(
        shapes, dtype, "fewer queries than keys", partial(whole, causal=True, masked=False, queries=40)
    )
    yield Case("attention_with_lse", "causal", dtype, partial(whole, causal=True, masked=False), shapes.tokens, 2.0,
               results=("result", "log-sum-exp"))  # fmt: skip
    yield Case("attention_with_lse", "another block", dtype, partial(whole, causal=False, masked=False),
               shapes.tokens, 2.0, results=("result", "log-sum-exp"))  # fmt: skip

    def backward(draw: Draw, *, causal: bool) -> Arguments:
        (q, k, v), keywords = whole(draw, causal=causal, masked=False)
        out, lse = attention_with_lse(q.double(), k.double(), v.double(), **keywords)
        return [draw.normal(*q.shape, dtype=dtype), q, k, v, out.to(dtype), lse.float()], keywords

    for causal, inputs in ((True, "causal"), (False, "another block")):
        yield Case("attention_backward", inputs, dtype, partial(backward, causal=causal), _summed_backward(shapes), 6.0,
                   results=("gradient of q", "gradient of k", "gradient of v"))  # fmt: skip


def norm_case(shapes: Shapes, dtype: torch.dtype, inputs: str, make: Callable[[Draw], Tensor]) -> Case:
    """`make` draws x [b, s, h]."""

    def arguments(draw: Draw) -> Arguments:
        weight = 1 + draw.normal(shapes.hidden, dtype=torch.float32) / 4
        return [make(draw), weight, shapes.eps], {}

    return Case("rms_norm", inputs, dtype, arguments, shapes.hidden, 1.0, 1.5, shapes.hidden,
                ((0, "x"), (1, "weight")))  # fmt: skip


def swiglu_case(shapes: Shapes, dtype: torch.dtype, inputs: str, gate_size: float, up_size: float) -> Case:
    def make(draw: Draw) -> Arguments:
        size = (shapes.rows, shapes.tokens, shapes.intermediate)
        gate, up = (draw.normal(*size, dtype=torch.float64) for _ in range(2))
        return [(gate * gate_size).to(dtype), (up * up_size).to(dtype)], {}

    return Case("swiglu", inputs, dtype, make, 4, 2.5, 3.0, 4, ((0, "gate"), (1, "up")))


def _rows(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    """What is computed of each token, or each number, alone."""
    hidden = (shapes.rows, shapes.tokens, shapes.hidden)
    yield norm_case(shapes, dtype, "normal", lambda draw: draw.normal(*hidden, dtype=dtype))
    yield swiglu_case(shapes, dtype, "normal", 1.0, 1.0)

    def rotation(draw: Draw) -> Arguments:
        x = draw.normal(shapes.rows, shapes.tokens, shapes.heads, shapes.head_dim, dtype=dtype)
        angles = 3 * draw.normal(shapes.tokens, shapes.head_dim // 2, dtype=torch.float64)
        return [x, angles.cos().float(), angles.sin().float()], {}

    yield Case("rotate", "normal", dtype, rotation, 2, 1.0, 1.0, 2, ((0, "x"),))
    yield Case("residual", "normal", dtype, lambda draw: ([draw.normal(*hidden, dtype=dtype) for _ in range(2)], {}),
               1, function=torch.add, exact=True)  # fmt: skip
    if dtype != torch.float32:
        yield Case("cast", "normal", dtype, lambda draw: ([draw.normal(*hidden, dtype=torch.float32)], {}), 1,
                   function=lambda x: x.to(dtype), exact=True)  # fmt: skip
    yield Case("sum", "over tokens", dtype, lambda draw: ([draw.normal(*hidden, dtype=dtype) + 0.25], {}),
               shapes.rows * shapes.tokens, function=lambda x: x.sum((0, 1)))  # fmt: skip
    yield Case("sum", "of everything", dtype, lambda draw: ([draw.normal(*hidden, dtype=dtype) + 0.25], {}),
               shapes.rows * shapes.tokens * shapes.hidden, function=lambda x: x.sum())  # fmt: skip


def product_case(
    shapes: Shapes, dtype: torch.dtype, inputs: str, sizes: tuple[int, int], make: Callable[[Draw, int, int], Tensor]
) -> Case:
    """x [b, s, in] by a float32 master [out, in] and a bias. `make` draws x."""
    wide, narrow = sizes

    def arguments(draw: Draw) -> Arguments:
        weight = draw.normal(wide, narrow, dtype=torch.float32) * narrow**-0.5
        return [make(draw, shapes.tokens, narrow), weight, draw.normal(wide, dtype=torch.float32)], {}

    # The master is cast to `dtype` first: one rounding more. Its gradient is rounded to `dtype` and cast back.
    roundings = 1.0 if dtype == torch.float32 else 2.0
    return Case("product", inputs, dtype, arguments, narrow, roundings, roundings, max(wide, shapes.tokens),
                ((0, "x"), (1, "weight"), (2, "bias")), function=product)  # fmt: skip


def _products(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    def normal(draw: Draw, tokens: int, width: int) -> Tensor:
        return draw.normal(shapes.rows, tokens, width, dtype=dtype)

    queries = shapes.heads * shapes.head_dim
    sizes = {
        "q_proj": (queries, shapes.hidden),
        "o_proj": (shapes.hidden, queries),
        "up_proj": (shapes.intermediate, shapes.hidden),
        "down_proj": (shapes.hidden, shapes.intermediate),
    }
    for name, size in sizes.items():
        yield product_case(shapes, dtype, name, size, normal)

    def experts(draw: Draw) -> Arguments:
        counts = torch.tensor([5, 0, 60, 17, 14])
        x = draw.normal(int(counts.sum()), 192, dtype=dtype)
        return [x, draw.normal(len(counts), 192, 160, dtype=dtype) / 14, counts], {}

    yield Case("grouped_matmul", "one expert idle", dtype, experts, 192, 1.0, 1.0, 192, ((0, "x"), (1, "weights")))

    def tokens(draw: Draw) -> Arguments:
        table = draw.normal(shapes.vocabulary, shapes.hidden, dtype=torch.float32)
        return [draw.integers(min(64, shapes.vocabulary), shapes.rows, shapes.tokens), table], {}

    def embedding(ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table).to(dtype)

    yield Case("embedding", "repeated tokens", dtype, tokens, 1, gradient_length=shapes.rows * shapes.tokens,
               differentiable=((1, "weight"),), function=embedding)  # fmt: skip


def loss_case(shapes: Shapes, dtype: torch.dtype, inputs: str, make: Callable[[Draw], Tensor]) -> Case:
    """`make` draws logits [tokens, vocabulary]; those of the targets must be finite."""

    def arguments(draw: Draw) -> Arguments:
        logits = make(draw)
        target = draw.integers(logits.shape[1], logits.shape[0])
        target = torch.where(logits.gather(1, target[:, None]).squeeze(1).isfinite(), target, logits.argmax(1))
        return [logits, target], {"with_gradient": True}

    # Rounding is of float32 throughout; losses near zero are differences of two numbers of the size of the logits.
    return Case("cross_entropy", inputs, dtype, arguments, shapes.vocabulary, 32 * 2.0**-24 / _unit(dtype),
                results=("loss", "gradient"))  # fmt: skip


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _loss(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    tokens = shapes.rows * shapes.tokens

    yield loss_case(shapes, dtype, "normal", lambda draw: 4 * draw.normal(tokens, shapes.vocabulary, dtype=dtype))

    def head(draw: Draw) -> Arguments:
        hidden = draw.normal(tokens, shapes.hidden, dtype=dtype)
        weight = 2 * draw.normal(shapes.vocabulary, shapes.hidden, dtype=torch.float32) * shapes.hidden**-0.5
        return [hidden, weight, draw.integers(shapes.vocabulary, tokens), 128], {}

    yield Case("head", "chunks of tokens", dtype, head, shapes.vocabulary, 0.5, 3.0, shapes.vocabulary,
               ((0, "hidden states"), (1, "weight")), function=head_cross_entropy)  # fmt: skip


def adamw_case(inputs: str, gradient_size: float, roundings: float) -> Case:
    """`roundings`: of parameters, counted in updates; where gradients are tiny, weight decay is all of an update."""

    def make(draw: Draw) -> Arguments:
        shapes = [(96, 80), (33,)]

        def normal(size: float) -> list[Tensor]:
            return [draw.normal(*shape, dtype=torch.float32) * size for shape in shapes]

        squares = [x.square() for x in normal(gradient_size)]
        steps = [torch.tensor(2.0) for _ in shapes]
        state: list[Any] = [normal(0.5), normal(gradient_size), normal(gradient_size / 4), squares, steps]
        return state, {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    return Case("adamw", inputs, torch.float32, make, 4, roundings, wrap=_updates,
                results=("update", "update of a vector"))  # fmt: skip


def _updates(operator: Callable[..., None]) -> Callable[..., list[Tensor]]:
    """What the step adds to parameters: they themselves are so much larger that they would hide it."""

    def run(parameters: list[Tensor], *state: list[Tensor], **keywords: Any) -> list[Tensor]:
        before = [p.clone() for p in parameters]
        operator(parameters, *state, **keywords)
        return [p - old for p, old in zip(parameters, before, strict=True)]

    return run


def clip_case(inputs: str, make: Callable[[Draw], Tensor]) -> Case:
    def clipped(x: Tensor) -> Tensor:
        scaled = x.clone()
        torch._foreach_mul_([scaled], 0.375)
        return scaled

    return Case("clip", inputs, torch.float32, lambda draw: ([make(draw)], {}), 1, function=clipped, exact=True)


def gradient_norm_case(inputs: str, size: float) -> Case:
    def make(draw: Draw) -> Arguments:
        return [size * draw.normal(300, 70, dtype=torch.float32)], {}

    def norm(x: Tensor) -> Tensor:
        return torch.stack(torch._foreach_norm([x, x])).square().sum().sqrt()

    return Case("gradient_norm", inputs, torch.float32, make, 21_000, function=norm)


def _optimizer(shapes: Shapes) -> Iterator[Case]:
    yield adamw_case("normal", 1.0, 20.0)
    yield clip_case("normal", lambda draw: draw.normal(128, 64, dtype=torch.float32))
    yield gradient_norm_case("normal", 1.0)
