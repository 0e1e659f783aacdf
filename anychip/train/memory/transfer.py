"""Files of one directory from process to process, in pieces, so that memory stays bounded whatever their size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from anychip import alive
from anychip.train.checkpoint.save import reason
from anychip.train.memory.parts import incoming

_PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Transfer:
    """`name` of `nbytes` goes from rank `source` to rank `target`; `tag` is its own between the two."""

    source: int
    target: int
    name: str
    nbytes: int
    tag: int


def move_files(transfers: Sequence[Transfer], directory: Path, group: dist.ProcessGroup | None) -> str:
    """Take part in those of `transfers` that begin or end here; all ranks of the group call this together.

    Piece n of every transfer is under way at once, and no rank waits before it has begun all of its own, so that
    chains and rings of transfers do not wait for one another in turn. Files go from `directory` here to the one of the
    target. Returns what went wrong here with reading or writing ("" for nothing): the bytes that were meant are then
    sent or taken all the same, and digests tell. Raises RuntimeError when a process is lost.
    """
    with ExitStack() as stack:
        ends = [_End(transfer, directory, group, stack) for transfer in transfers if group is not None]
        for start in range(0, max((end.transfer.nbytes for end in ends), default=0), _PIECE_BYTES):
            active = [end for end in ends if start < end.transfer.nbytes]
            under_way = [end.begin(start) for end in active]
            for work in under_way:
                work.wait()
            for end in active:
                end.finish(start)
            alive.progressed()
        return "; ".join(sorted({end.problem for end in ends if end.problem}))


class _End:
    """One end of a transfer, with a buffer of one piece."""

    def __init__(self, transfer: Transfer, directory: Path, group: dist.ProcessGroup | None, stack: ExitStack) -> None:
        self.transfer, self.problem = transfer, ""
        self._group, self._sends = group, dist.get_rank(group) == transfer.source
        self._buffer = torch.zeros(min(_PIECE_BYTES, transfer.nbytes), dtype=torch.uint8)
        self._descriptor = -1
        try:
            self._descriptor = self._open(directory)
            stack.callback(os.close, self._descriptor)
        except OSError as error:
            self.problem = reason(error)

    def begin(self, start: int) -> dist.Work:
        piece, tag = self._piece(start), self.transfer.tag
        if self._sends:
            self._try(os.preadv, piece, start)
            work = dist.isend(piece, group=self._group, tag=tag, group_dst=self.transfer.target)
        else:
            work = dist.irecv(piece, group=self._group, tag=tag, group_src=self.transfer.source)
        assert work is not None
        return work

    def finish(self, start: int) -> None:
        if not self._sends:
            self._try(os.pwritev, self._piece(start), start)

    def _open(self, directory: Path) -> int:
        if self._sends:
            return os.open(directory / self.transfer.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        directory.mkdir(mode=0o700, exist_ok=True)
        path = incoming(directory, self.transfer.name)
        path.unlink(missing_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _piece(self, start: int) -> Tensor:
        return self._buffer[: min(_PIECE_BYTES, self.transfer.nbytes - start)]

    def _try(self, move: Callable[[int, list[memoryview], int], int], piece: Tensor, start: int) -> None:
        if self.problem:
            return
        try:
            done = move(self._descriptor, [piece.numpy().data], start)
            if done != piece.numel():
                self.problem = f"{self.transfer.name} was cut short at byte {start + done}"
        except OSError as error:
            self.problem = reason(error)
