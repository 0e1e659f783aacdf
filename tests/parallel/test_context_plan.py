"""How a sequence is cut, and which queries meet which keys: every visible pair once, the same work for all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anychip.errors import InputError
from anychip.model.decoder import same_document
from anychip.model.rope import rotary, rotary_at
from anychip.parallel.context import join_parts, split_positions, take_part
from anychip.parallel.context.blocks import (
    Plan,
    gathered_plan,
    gathered_plan_inside,
    ring_plan,
    ring_plan_inside,
)
from anychip.recipe.schema import ModelConfig, RopeScaling

METHODS = ("ring", "all_gather")


def computed(plan: Plan, method: str, batch: int, seq: int, contexts: int, rank: int) -> Tensor:
    """How often this process computes each pair of the whole sequence, [b, seq, seq]."""
    everywhere = [split_positions(seq, contexts, r) for r in range(contexts)]
    mine = everywhere[rank]
    keys = (
        [everywhere[(rank - step) % contexts] for step in range(contexts)] if method == "ring" else [torch.arange(seq)]
    )
    count = torch.zeros(batch, seq, seq, dtype=torch.int64)
    assert len(plan) == len(keys)
    for blocks, positions in zip(plan, keys, strict=True):
        for block in blocks:
            rows, columns = mine[block.rows], positions[block.columns]
            seen = torch.ones(batch, len(rows), len(columns), dtype=torch.bool)
            if block.causal:
                seen &= torch.ones(len(rows), len(columns), dtype=torch.bool).tril(len(columns) - len(rows))
            if block.mask is not None:
                seen &= block.mask[:, 0]
            count[:, rows[:, None], columns] += seen
    return count


@pytest.mark.parametrize("contexts", [1, 2, 3, 8])
def test_parts_make_up_the_sequence(contexts: int) -> None:
    seq = 16 * contexts
    whole = torch.randn(2, seq, 3)
    parts = [take_part(whole, contexts, rank) for rank in range(contexts)]
    assert torch.equal(join_parts(parts), whole)
    positions = [split_positions(seq, contexts, rank) for rank in range(contexts)]
    assert all(torch.equal(part, whole[:, index]) for part, index in zip(parts, positions, strict=True))
    assert all(index.dtype == torch.int64 and (index.diff() > 0).all() for index in positions)
    assert torch.equal(take_part(whole.mT, contexts, 0, dim=2), parts[0].mT)


@pytest.mark.parametrize(("seq", "contexts", "choices"), [(50, 4, "48 or 56"), (5, 4, "8")])
def test_a_length_that_does_not_divide_is_refused(seq: int, contexts: int, choices: str) -> None:
    with pytest.raises(InputError, match=f"Choose seq_length {choices}."):
        split_positions(seq, contexts, 0)


@pytest.mark.parametrize("contexts", [2, 3, 4, 16, 64])
@pytest.mark.parametrize("method", METHODS)
def test_all_processes_do_the_same_work(contexts: int, method: str) -> None:
    part = 64
    seq = part * contexts
    plans = [(ring_plan if method == "ring" else gathered_plan)(part, contexts, rank) for rank in range(contexts)]
    work = {sum(block.products for blocks in plan for block in blocks) for plan in plans}
    assert work == {seq * (seq + 1) / 2 / contexts}
    if method == "ring":  # and at every step, so that nobody waits
        assert all(len({sum(b.products for b in plan[step]) for plan in plans}) == 1 for step in range(contexts))


@settings(deadline=None, max_examples=60)
@given(
    contexts=st.integers(2, 5),
    half=st.integers(1, 6),
    method=st.sampled_from(METHODS),
    kind=st.sampled_from(["none", "rising", "any"]),
    data=st.data(),
)
def test_every_visible_pair_is_computed_once(
    contexts: int, half: int, method: str, kind: str, data: st.DataObject
) -> None:
    seq, batch = 2 * contexts * half, 2
    visible = torch.ones(seq, seq, dtype=torch.bool).tril().expand(batch, seq, seq)
    if kind == "none":
        plans = [
            (ring_plan if method == "ring" else gathered_plan)(2 * half, contexts, rank) for rank in range(contexts)
        ]
    else:
        numbers = st.lists(st.integers(0, 4), min_size=seq, max_size=seq)
        documents = torch.tensor([data.draw(numbers) for _ in range(batch)])
        if kind == "rising":
            documents = (documents == 0).cumsum(1)
        visible = visible & same_document(documents)[:, 0]
        parts = torch.stack([take_part(documents, contexts, rank) for rank in range(contexts)])
        inside = ring_plan_inside if method == "ring" else gathered_plan_inside
        plans = [inside(parts, rank) for rank in range(contexts)]
    total = sum(computed(plan, method, batch, seq, contexts, rank) for rank, plan in enumerate(plans))
    assert torch.equal(total, visible.long())


def test_short_documents_cost_what_they_hold() -> None:
    """Documents of 64 tokens: no process works on another's keys, but for those at a chunk's edge."""
    contexts, seq = 4, 2048
    documents = (torch.arange(seq) // 64)[None]
    parts = torch.stack([take_part(documents, contexts, rank) for rank in range(contexts)])
    for rank in range(contexts):
        own, *others = ring_plan_inside(parts, rank)
        assert len(own) == 2 and not any(others)
    one = torch.zeros(contexts, 1, seq // contexts, dtype=torch.int64)
    for inside in (ring_plan_inside, gathered_plan_inside):
        blocks = [block for rank in range(contexts) for found in inside(one, rank) for block in found]
        assert all(block.mask is None for block in blocks)
        assert sum(block.products for block in blocks) == seq * (seq + 1) / 2


@pytest.mark.parametrize("cached_keys", ["rerotate", "published"])
@pytest.mark.parametrize("length", [16, 48, 4096])
def test_positions_give_the_tables_of_the_whole_sequence(cached_keys: str, length: int) -> None:
    scaling = RopeScaling(base_length=16, training_length=16, cached_keys=cached_keys)
    model = ModelConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_scaling=scaling,
    )
    whole = rotary(model, 0, length, length)
    in_order = rotary_at(model, torch.arange(length), length)
    assert torch.equal(whole.cos, in_order.cos) and torch.equal(whole.sin, in_order.sin)
    positions = split_positions(length, 4, 1)
    part = rotary_at(model, positions, length)
    assert torch.equal(part.cos, whole.cos[positions]) and torch.equal(part.sin, whole.sin[positions])
    assert part.score_scale == whole.score_scale == in_order.score_scale
