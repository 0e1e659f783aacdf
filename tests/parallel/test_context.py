"""Attention and a decoder over parts of a sequence against one process that has it all, on spawned gloo ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rank_pool import run_ranks
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from anychip.chips.operators import Operators, blocked_attention, reference
from anychip.model.arithmetic import parameter_shapes
from anychip.model.decoder import Decoder, same_document
from anychip.model.init import init_tensor
from anychip.parallel.context import apply_context_parallel, join_parts, split_positions, take_part
from anychip.parallel.context.apply import ContextAttention, plan_inside
from anychip.recipe.schema import ModelConfig, RopeScaling
from anychip.train.recompute import apply_recompute

SEQ, SCALE = 48, 0.3
METHODS = ("ring", "all_gather")
LIMITS = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-2}  # norm of the difference over the norm
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_scaling=RopeScaling(base_length=16, training_length=16),
)
BLOCKED = replace(
    reference,
    attention_with_lse=blocked_attention.attention_with_lse,
    attention_backward=blocked_attention.attention_backward,
)


def documents_of(kind: str) -> Tensor | None:
    """[2, SEQ] int64; rows differ. `shuffled` numbers do not rise along the sequence."""
    if kind == "none":
        return None
    limits = {"long": ([20], [41]), "short": ([3, 4, 11, 19, 30, 31, 44], [13, 24, 36])}[kind.split("-")[0]]
    rows = [torch.bucketize(torch.arange(SEQ), torch.tensor(row), right=True) for row in limits]
    documents = torch.stack(rows)
    return (documents * 5 + 3) % 7 if kind.endswith("shuffled") else documents


def inputs(dtype: torch.dtype, key_heads: int) -> list[Tensor]:
    """q, k, v and the gradient of the result, of the whole sequence."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, 4, SEQ, 8), (2, key_heads, SEQ, 8), (2, key_heads, SEQ, 8), (2, 4, SEQ, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def in_one_process(dtype: torch.dtype, key_heads: int, documents: Tensor | None) -> list[Tensor]:
    """Result and gradients of q, k, v in fp64, from the inputs as they are in `dtype`."""
    q, k, v, grad = (x.double() for x in inputs(dtype, key_heads))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = None if documents is None else same_document(documents)
    out = reference.attention(*leaves, scale=SCALE, causal=True, mask=mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def in_parts(
    method: str, dtype: torch.dtype, key_heads: int, documents: Tensor | None, operators: Operators
) -> list[Tensor]:
    """The same, of the whole sequence, from the parts of all processes."""
    contexts, rank = dist.get_world_size(), dist.get_rank()
    q, k, v, grad = (take_part(x, contexts, rank, dim=2) for x in inputs(dtype, key_heads))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    group = dist.group.WORLD
    assert group is not None
    plan = None if documents is None else plan_inside(take_part(documents, contexts, rank), group, method)
    out = ContextAttention(group, method, operators)(*leaves, scale=SCALE, causal=True, mask=plan)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    assert all(x.dtype == dtype for x in found)
    return [gathered(x, 2) for x in found]


def gathered(part: Tensor, dim: int) -> Tensor:
    """The whole sequence, from everyone's part."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return join_parts(parts, dim)


CASES = [
    (method, dtype, key_heads, kind, operators)
    for method in METHODS
    for dtype in LIMITS
    for key_heads, kind, operators in [
        (2, "none", "kernel"),
        (4, "none", "kernel"),
        (1, "long", "kernel"),
        (2, "short", "kernel"),
        (2, "short-shuffled", "kernel"),
        (2, "none", "blocked"),
        (2, "short", "blocked"),
    ]
]


def compare_attention() -> dict[str, float]:
    errors = {}
    for method, dtype_name, key_heads, kind, name in CASES:
        dtype, documents = getattr(torch, dtype_name), documents_of(kind)
        operators = BLOCKED if name == "blocked" else reference
        found = in_parts(method, dtype, key_heads, documents, operators)
        expected = in_one_process(dtype, key_heads, documents)
        errors[f"{method}-{dtype_name}-{key_heads}-{kind}-{name}"] = largest_error(found, expected)
    return errors


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm; NaN counts."""
    errors = torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)])
    return float(errors.max())


def decoder_results(recompute: str, method: str | None, documents: Tensor | None) -> list[Tensor]:
    """Hidden states of the whole sequence and gradients of all parameters, in fp64; over all processes by `method`."""
    torch.set_default_dtype(torch.float64)
    model = Decoder(MODEL, torch.float64)
    torch.set_default_dtype(torch.float32)
    parameters = dict(model.named_parameters())
    for name, shape in parameter_shapes(MODEL):
        parameters[name].data.copy_(init_tensor(name, shape, MODEL, 5) * 5)
    input_ids = torch.randint(0, 64, (2, SEQ), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, SEQ, MODEL.hidden_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    places: dict[str, Any] = {}
    if method is not None:
        contexts, rank = dist.get_world_size(), dist.get_rank()
        group = dist.group.WORLD
        assert group is not None
        apply_context_parallel(model, group, method)
        input_ids, weights = take_part(input_ids, contexts, rank), take_part(weights, contexts, rank)
        documents = None if documents is None else take_part(documents, contexts, rank)
        places = {"positions": split_positions(SEQ, contexts, rank), "length": SEQ}
    apply_recompute(model, recompute)
    hidden = model(input_ids, documents=documents, **places)
    hidden.backward(weights)
    gradients = [parameter.grad for parameter in model.layers.parameters()]
    if method is None:
        return [hidden.detach(), *gradients]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [gathered(hidden.detach(), 1), *gradients]


def compare_decoders() -> dict[str, float]:
    errors = {}
    for kind in ("none", "short"):
        documents = documents_of(kind)
        expected = decoder_results("none", None, documents)
        for method in METHODS:
            for recompute in ("none", "selective", "full"):
                found = decoder_results(recompute, method, documents)
                errors[f"{method}-{kind}-{recompute}"] = largest_error(found, expected)
    return errors


def measure(method: str) -> dict[str, float]:
    """Of one attention with 64 tokens a process, in units of one process's keys or values (bf16): bytes sent and most
    bytes alive beyond the inputs, forward and backward."""
    group = dist.group.WORLD
    assert group is not None
    q, k, v = (torch.randn(1, 4, 64, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    attend = ContextAttention(group, method, reference)
    grad, unit = torch.ones_like(q), k.nbytes
    sent = [0]

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent[0] += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return really(operations)

    really = dist.batch_isend_irecv

    def observed(work: Callable[[], Any]) -> tuple[Any, float, float]:
        sent[0] = 0
        tracker = MemTracker()
        tracker.track_external(q, k, v, grad)
        with tracker, patch.object(dist, "batch_isend_irecv", counted):
            result = work()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        return result, sent[0] / unit, peak / unit - 4

    def once() -> dict[str, float]:
        out, forward_sent, forward_peak = observed(lambda: attend(q, k, v, scale=SCALE, causal=True, mask=None))
        _, backward_sent, backward_peak = observed(lambda: torch.autograd.grad(out, (q, k, v), grad))
        return {
            "forward_sent": forward_sent,
            "forward_peak": forward_peak,
            "backward_sent": backward_sent,
            "backward_peak": backward_peak,
        }

    # A library's threads may let go of a message a little after it has come: the least of some runs is what it takes.
    runs = [once() for _ in range(5)]
    return {name: min(run[name] for run in runs) for name in runs[0]}


def work(folder: Path) -> None:
    results = {
        "attention": compare_attention(),
        "decoder": compare_decoders(),
        "measured": {method: measure(method) for method in METHODS},
    }
    if dist.get_rank() == 0:
        (folder / f"{dist.get_world_size()}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("context")
    for size in (2, 4):
        run_ranks(size, work, folder, folder, timeout=120)
    return {size: json.loads((folder / f"{size}.json").read_text()) for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", LIMITS)
def test_attention_in_parts_is_attention_at_once(results: dict[int, Any], size: int, dtype: str) -> None:
    errors = {case: error for case, error in results[size]["attention"].items() if dtype in case}
    assert len(errors) == 14
    assert not {case: error for case, error in errors.items() if not error < LIMITS[dtype]}


@pytest.mark.parametrize("size", [2, 4])
def test_a_decoder_in_parts_is_the_decoder(results: dict[int, Any], size: int) -> None:
    errors = results[size]["decoder"]
    assert len(errors) == 12
    assert not {case: error for case, error in errors.items() if not error < 1e-12}


def test_the_ring_sends_keys_around_and_gradients_home(results: dict[int, Any]) -> None:
    """Keys and values go c - 1 hops, in backward again; their gradients, in fp32, c hops."""
    for size in (2, 4):
        ring = results[size]["measured"]["ring"]
        assert ring["forward_sent"] == 2 * (size - 1)
        assert ring["backward_sent"] == 2 * (size - 1) + 2 * 2 * size


def test_the_ring_never_holds_all_keys(results: dict[int, Any]) -> None:
    two, four = (results[size]["measured"] for size in (2, 4))
    for phase in ("forward_peak", "backward_peak"):
        assert four["ring"][phase] <= two["ring"][phase] + 4  # one more message between, never one more a process
        assert four["all_gather"][phase] >= two["all_gather"][phase] + 4
