"""Which tokens of a sequence each process holds, so that causal attention costs all of them the same.

The sequence is cut into 2c chunks and process r of c holds chunks r and 2c - 1 - r, in this order: one that sees little
of the past and one that sees much of it (as in striped and zigzag ring attention, arXiv 2311.09431, 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anychip.errors import InputError


def split_positions(seq: int, contexts: int, rank: int) -> Tensor:
    """Positions in the whole sequence of the tokens that process `rank` of `contexts` holds, ascending: int64
    [seq / contexts]. Raises InputError when the sequence does not divide into 2 x contexts chunks."""
    if contexts == 1:
        return torch.arange(seq)
    size = chunk_size(seq, contexts)
    first, second = chunks_of(contexts, rank)
    return torch.cat([torch.arange(chunk * size, (chunk + 1) * size) for chunk in (first, second)])


def take_part(x: Tensor, contexts: int, rank: int, dim: int = 1) -> Tensor:
    """The part of a whole sequence that process `rank` holds; input ids, labels and documents alike.

    [b, seq, ...] -> [b, seq / contexts, ...], a copy unless there is one process.
    """
    if contexts == 1:
        return x
    size = chunk_size(x.shape[dim], contexts)
    return torch.cat([x.narrow(dim, chunk * size, size) for chunk in chunks_of(contexts, rank)], dim)


def join_parts(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    """The whole sequence out of the parts of all processes, by rank: the inverse of `take_part`."""
    if len(parts) == 1:
        return parts[0]
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


def chunks_of(contexts: int, rank: int) -> tuple[int, int]:
    """The two chunks, of 2 x contexts, that a process holds."""
    return rank, 2 * contexts - 1 - rank


def chunk_size(seq: int, contexts: int) -> int:
    """Tokens of a chunk."""
    size, left = divmod(seq, 2 * contexts)
    if left or not size:
        lower, upper = size * 2 * contexts, (size + 1) * 2 * contexts
        raise InputError(
            f"a sequence of {seq} tokens does not divide into the {2 * contexts} chunks that context_parallel "
            f"{contexts} needs.",
            do=f"Choose seq_length {f'{lower} or {upper}' if lower else upper}.",
        )
    return size
