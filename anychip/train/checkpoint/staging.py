"""A copy of the state in host memory, so that training may go on while it is written."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anychip.train.checkpoint.manifest import DTYPES
from anychip.train.checkpoint.plan import Box, SaveParts

_ALIGNMENT = 64


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
            self._memory.numpy().fill(1)

    def copy(self, parts: SaveParts) -> dict[Box, Tensor]:
        """Copy every box; the returned tensors are views of the buffer, valid until the next copy."""
        self.reserve(parts)
        staged, start = {}, 0
        for box in parts.boxes:
            flat = self._memory[start : start + box.nbytes]
            _copy(flat, parts.tensor(box))
            staged[box] = flat.view(DTYPES[box.dtype]).view(box.sizes)
            start += _room(box)
        return staged


def _copy(flat: Tensor, tensor: Tensor) -> None:
    """Copy the elements of `tensor` to the bytes `flat`.

    One core saturates memory when bytes are moved as they are. PyTorch's own copy shares the work among threads that
    wait for each other after every tensor, which on a busy host took six times as long.
    """
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        np.copyto(flat.numpy(), tensor.reshape(-1).view(torch.uint8).numpy())
    else:
        with torch.no_grad():
            flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _room(box: Box) -> int:
    return -(-box.nbytes // _ALIGNMENT) * _ALIGNMENT
