"""Attention of single tokens to caches has the bits of attention over the whole sequence, where there is the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anychip.chips.compiling import find_compiler
from anychip.chips.operators import OperatorFallback, cached, operators_for
from anychip.chips.operators.cached import attends_cached, cached_attention
from anychip.chips.operators.cpu import library

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(
    not library.RUNS_HERE or find_compiler() is None, reason="needs AVX-512 with bf16 and a C++ compiler"
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [s, heads, d] by the operator of training, -> [s, heads, d]."""
    turned = (x.transpose(0, 1)[None] for x in (q, k, v))
    return operators_for("cpu").attention(*turned, scale=0.2, causal=True, mask=None)[0].transpose(0, 1)


@needs_kernels
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 32), (3, 3, 48), (6, 1, 16), (8, 2, 128), (2, 1, 576)])
def test_each_token_has_the_bits_of_the_whole_pass(heads: int, groups: int, size: int) -> None:
    """Three sequences in turn, a step a token, in caches that have room for more; the longest passes two blocks."""
    assert attends_cached(CPU, torch.bfloat16, size)
    lengths = (150, 65, 16)
    sequences = [[draw(length, n, size, seed=length + n) for n in (heads, groups, groups)] for length in lengths]
    keys, values = (torch.full((5, groups, 160, size), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    places, found = (3, 0, 1), [[], [], []]
    for position in range(max(lengths)):
        here = [index for index, length in enumerate(lengths) if position < length]
        q, k, v = (torch.stack([sequences[index][which][position] for index in here]) for which in range(3))
        tokens, out = (
            torch.tensor([[row, places[index], position] for row, index in enumerate(here)]),
            torch.empty_like(q),
        )
        cached_attention(q, k, v, keys, values, tokens, 0.2, out)
        for row, index in enumerate(here):
            found[index].append(out[row])
    for index, (q, k, v) in enumerate(sequences):
        assert torch.equal(torch.stack(found[index]), whole(q, k, v))
        assert torch.equal(keys[places[index], :, : len(k)].transpose(0, 1), k)
        assert torch.equal(values[places[index], :, : len(v)].transpose(0, 1), v)
    assert keys[[2, 4]].isnan().all() and keys[3, :, 150:].isnan().all(), "nothing else was written"


@needs_kernels
def test_a_piece_of_a_sequence_beside_a_token_of_another() -> None:
    """Rows lie in wider ones, in any order, and some attend elsewhere."""
    wide = draw(9, 4, 32, seed=1)
    q, k, v = wide.narrow(1, 0, 2), wide.narrow(1, 2, 1), wide.narrow(1, 3, 1)
    keys, values = (torch.zeros(2, 1, 32, 32, dtype=torch.bfloat16) for _ in range(2))
    tokens = torch.tensor([[8, 1, 0], *([row + 2, 0, row] for row in range(5))])
    out = torch.full((9, 2, 32), torch.inf, dtype=torch.bfloat16)
    cached_attention(q, k, v, keys, values, tokens, 0.2, out)
    padded = [torch.cat((x[2:7], torch.zeros(11, *x.shape[1:], dtype=x.dtype))) for x in (q, k, v)]
    assert torch.equal(out[2:7], whole(*padded)[:5])
    assert torch.equal(out[8], v[8].expand(2, -1)), "the first token of a sequence sees itself alone"
    assert out[[0, 1, 7]].isinf().all()


def test_other_tensors_are_not_for_it() -> None:
    assert not attends_cached(CPU, torch.float32, 32)
    assert not attends_cached(CPU, torch.bfloat16, 24)
    assert not attends_cached(torch.device("meta"), torch.bfloat16, 32)


@needs_kernels
def test_a_kernel_that_is_wrong_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_too_few(*arguments: Any) -> None:
        *before, tokens, scale, out = arguments
        right(*before, tokens - torch.tensor([0, 0, 1]), scale, out)

    right = cached.cached_attention
    cached._proved.cache_clear()
    monkeypatch.setattr(cached, "cached_attention", one_too_few)
    with pytest.warns(OperatorFallback, match="attention to caches"):
        assert not attends_cached(CPU, torch.bfloat16, 32)
    cached._proved.cache_clear()
