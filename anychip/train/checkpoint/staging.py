"""A copy of the state in host memory, so that training may go on while it is written."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from anychip import alive
from anychip.train.checkpoint.manifest import DTYPES
from anychip.train.checkpoint.plan import Box, SaveParts

_ALIGNMENT = 64
_COPY_THREADS = 4
_PIECE_BYTES = 16 << 20
_TOUCH_BYTES = 1 << 30


class StagingBuffer:
    """One block of host memory, as large as the largest state so far, reused by every save.

    Memory fresh from the system costs a page fault per 4 KiB on first touch, several times the cost of the copy, so
    `reserve` touches it once, ahead of the first save.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, parts: SaveParts) -> None:
        needed = sum(_room(box) for box in parts.boxes)
        if self._memory.numel() < needed:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old block first
            self._memory = torch.empty(needed, dtype=torch.uint8)
            for start in range(0, needed, _TOUCH_BYTES):
                self._memory[start : start + _TOUCH_BYTES].numpy().fill(1)
                alive.progressed()

    def copy(self, parts: SaveParts) -> dict[Box, Tensor]:
        """Copy every box; the returned tensors are views of the buffer, valid until the next copy."""
        self.reserve(parts)
        staged, start = {}, 0
        with ThreadPoolExecutor(min(_COPY_THREADS, os.cpu_count() or 1)) as pool:
            copies: list[Future[None]] = []
            for box in parts.boxes:
                flat = self._memory[start : start + box.nbytes]
                staged[box] = flat.view(DTYPES[box.dtype]).view(box.sizes)
                copies += _copy(staged[box], parts.tensor(box), pool)
                start += _room(box)
                alive.progressed()
            for copy in copies:
                copy.result()
                alive.progressed()
        return staged


def _copy(target: Tensor, source: Tensor, pool: ThreadPoolExecutor) -> list[Future[None]]:
    """Copy elements, those of large tensors in pieces that the pool takes independently of each other.

    PyTorch's own copy splits each tensor among threads that then wait for one another, which on a busy host took six
    times as long.
    """
    if source.device.type != "cpu" or not source.is_contiguous() or source.nbytes < _PIECE_BYTES >> 8:
        with torch.no_grad():
            target.copy_(source)
        return []
    to, origin = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (target, source))
    pieces = (slice(start, start + _PIECE_BYTES) for start in range(0, len(to), _PIECE_BYTES))
    return [pool.submit(np.copyto, to[piece], origin[piece]) for piece in pieces]


def _room(box: Box) -> int:
    return -(-box.nbytes // _ALIGNMENT) * _ALIGNMENT
