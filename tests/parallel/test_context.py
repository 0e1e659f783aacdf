"""Attention and a decoder over parts of a sequence against one process that has it all."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import run_ranks
from torch import Tensor

from anychip.chips.operators import Operators, blocked_attention, reference
from anychip.errors import InputError
from anychip.model.decoder import Decoder, same_document
from anychip.model.init import init_parameters
from anychip.model.rope import rotary, rotary_at
from anychip.parallel.context import apply_context_parallel, join_parts, split_positions, take_part
from anychip.parallel.context.apply import ContextAttention
from anychip.parallel.context.attention import GatheredAttention, RingAttention
from anychip.parallel.context.blocks import (
    gathered_plan,
    gathered_plan_of_documents,
    ring_plan,
    ring_plan_of_documents,
)
from anychip.recipe.schema import ModelConfig, RopeScaling

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
    plan = None
    if documents is not None:
        of_documents = ring_plan_of_documents if method == "ring" else gathered_plan_of_documents
        plan = of_documents(take_part(documents, contexts, rank), group)
    out = ContextAttention(group, method, operators)(*leaves, scale=SCALE, causal=True, mask=plan)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    assert all(x.dtype == dtype for x in found)
    whole = []
    for x in found:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(contexts)]
        dist.all_gather(parts, x.contiguous())
        whole.append(join_parts(parts, dim=2))
    return whole


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


def compare_attention(folder: Path) -> None:
    errors = {}
    for method, dtype_name, key_heads, kind, name in CASES:
        dtype, documents = getattr(torch, dtype_name), documents_of(kind)
        operators = BLOCKED if name == "blocked" else reference
        found = in_parts(method, dtype, key_heads, documents, operators)
        expected = in_one_process(dtype, key_heads, documents)
        case = f"{method}-{dtype_name}-{key_heads}-{kind}-{name}"
        errors[case] = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    if dist.get_rank() == 0:
        (folder / f"errors-{dist.get_world_size()}.json").write_text(json.dumps(errors))


@pytest.fixture(scope="module", params=[2, 4])
def attention_errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("attention")
    run_ranks(request.param, compare_attention, folder, folder, timeout=100)
    found: dict[str, float] = json.loads((folder / f"errors-{request.param}.json").read_text())
    return found


@pytest.mark.parametrize("dtype", LIMITS)
def test_attention_in_parts_is_attention_at_once(attention_errors: dict[str, float], dtype: str) -> None:
    mine = {case: error for case, error in attention_errors.items() if dtype in case}
    assert len(mine) == 14
    assert not {case: error for case, error in mine.items() if not error < LIMITS[dtype]}
