"""Data parallelism: every process holds the whole model and reads its own rows of each global batch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anychip.errors import InputError


@dataclass(frozen=True)
class DataParallel:
    """This process's place among `size` replicas. Size 1 needs no process group."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, collective_backend: str) -> DataParallel:
        """Join the process group that torchrun describes; alone when it describes none."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group(collective_backend)
        return cls(dist.get_rank(), size)

    def rows(self, global_batch_size: int, micro_batch_size: int) -> range:
        """Rows of the global batch that this process reads."""
        if global_batch_size % (self.size * micro_batch_size):
            raise InputError(
                f"global_batch_size {global_batch_size} does not divide into {self.size} processes with "
                f"micro_batch_size {micro_batch_size}.",
                do=f"Choose a global_batch_size that is a multiple of {self.size * micro_batch_size}.",
            )
        share = global_batch_size // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up gradients over processes. The loss is already divided by the labels of the whole batch, so SUM is
        all a collective library must know."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def any(self, flag: bool) -> bool:
        """Whether any process says so: all of them get the same answer."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
