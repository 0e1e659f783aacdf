"""What attention of one process is made of: blocks of its queries against keys that may lie elsewhere.

A block is a range of queries and a range of keys that see each other as a whole, or up to the diagonal, or up to the
limits of documents. Blocks are planned once a forward pass, on the host; with documents, what nobody sees is left out.

A plan lists, for each set of keys in the order in which they come, the blocks to compute: maybe none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anychip.parallel.context.split import join_parts


@dataclass(frozen=True)
class Block:
    """`rows` of this process's queries meet `columns` of some keys. `query_documents` [b, rows] and `key_documents`
    [b, columns] are None when all of them may."""

    rows: slice
    columns: slice
    causal: bool = False
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """[b, 1, rows, columns] bool, made when it is needed and not kept: True where documents agree."""
        if self.query_documents is None or self.key_documents is None:
            return None
        return (self.query_documents[:, :, None] == self.key_documents[:, None, :])[:, None]

    @property
    def products(self) -> float:
        """Query-key pairs that a kernel which skips a causal half computes: what the block costs."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return rows * columns - (rows * (rows - 1) / 2 if self.causal else 0)


Plan = list[list[Block]]


def ring_plan(part: int, contexts: int, rank: int) -> Plan:
    """What `part` queries of process `rank` see of the keys of process rank, rank - 1, rank - 2, ...

    Keys of a lower rank: their first chunk lies before both of ours, their second one behind. Keys of a higher rank:
    both chunks lie before our second chunk and behind our first. So every step but the first costs the same.
    """
    whole, first, second = _chunks(part)
    before, behind = [Block(whole, first)], [Block(second, whole)]
    return [[Block(whole, whole, causal=True)], *(before if step <= rank else behind for step in range(1, contexts))]


def gathered_plan(part: int, contexts: int, rank: int) -> Plan:
    """What the two chunks of process `rank` see of the keys of the whole sequence: everything up to themselves."""
    _, first, second = _chunks(part)
    ends = (rank + 1) * first.stop, (2 * contexts - rank) * first.stop
    return [[Block(rows, slice(0, end), causal=True) for rows, end in zip((first, second), ends, strict=True)]]


def ring_plan_inside(documents: Tensor, rank: int) -> Plan:
    """`ring_plan` where attention stays inside documents: int [contexts, b, part], those of all processes."""
    contexts, _, part = documents.shape
    _, first, second = _chunks(part)
    own = [Block(first, first, causal=True), Block(second, second, causal=True), Block(second, first)]
    on_host, limited = documents.cpu(), []
    for step, blocks in enumerate([own, *ring_plan(part, contexts, rank)[1:]]):
        peer = (rank - step) % contexts
        limited.append(_inside(blocks, documents[rank], documents[peer], on_host[rank], on_host[peer]))
    return limited


def gathered_plan_inside(documents: Tensor, rank: int) -> Plan:
    """`gathered_plan` where attention stays inside documents: int [contexts, b, part], those of all processes."""
    contexts, _, part = documents.shape
    on_host, keys = documents.cpu(), join_parts(documents.unbind())
    (blocks,) = gathered_plan(part, contexts, rank)
    return [_inside(blocks, documents[rank], keys, on_host[rank], join_parts(on_host.unbind()))]


def _chunks(part: int) -> tuple[slice, slice, slice]:
    """All tokens of a process, its first chunk, its second chunk."""
    return slice(0, part), slice(0, part // 2), slice(part // 2, part)


def _inside(
    blocks: list[Block], queries: Tensor, keys: Tensor, queries_on_host: Tensor, keys_on_host: Tensor
) -> list[Block]:
    """Blocks without the keys (and, off the diagonal, the queries) whose document is not on the other side. Only least
    and greatest numbers are looked at: documents may be numbered at will, numbers that rise are cut closest."""
    limited = []
    for block in blocks:
        rows = block.rows
        columns = _present(keys_on_host, block.columns, queries_on_host[:, rows])
        if columns is None:
            continue
        if block.causal:  # ends at the diagonal: keys may only be left out at the front
            columns = slice(columns.start, block.columns.stop)
        else:
            rows = _present(queries_on_host, rows, keys_on_host[:, columns]) or rows
        smaller = replace(block, rows=rows, columns=columns)
        if not _one_document(queries_on_host[:, rows], keys_on_host[:, columns]):
            smaller = replace(smaller, query_documents=queries[:, rows], key_documents=keys[:, columns])
        limited.append(smaller)
    return limited


def _present(documents: Tensor, within: slice, others: Tensor) -> slice | None:
    """From the first to the last position whose number, in any row, lies between the least and greatest of `others`."""
    mine, least, greatest = documents[:, within], others.amin(1, keepdim=True), others.amax(1, keepdim=True)
    found = ((mine >= least) & (mine <= greatest)).any(0).nonzero()
    if not len(found):
        return None
    return slice(within.start + int(found[0]), within.start + int(found[-1]) + 1)


def _one_document(queries: Tensor, keys: Tensor) -> bool:
    """Whether each row of the batch is inside one document."""
    both = torch.cat((queries, keys), 1)
    return bool((both == both[:, :1]).all())
