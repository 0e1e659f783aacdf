"""Copies of the same weights and optimizer state must be the same bits. A chip that computes wrongly without saying so,
or a memory cell that turns over, makes them differ, and nothing else ever shows it.

Every process reduces its tensors to one number each; those that hold the same part exchange them, and the majority is
right. What all copies share cannot be seen so: a gradient that was wrong before it was summed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from anychip.parallel.gradients import COPY_AXES, sharded_axes
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """The sum of a tensor's words as integers, int64 modulo 2^64, on its device. One flipped bit always changes it; two
    in one tensor cancel only when they are the same bit of two words, turned in opposite directions. The widest words
    that fit are the fastest to read."""
    flat = local(tensor.detach()).contiguous().reshape(-1)
    size = flat.element_size()
    start, nbytes = flat.storage_offset() * size, flat.numel() * size
    width = max(w for w in _WORDS if w >= size and start % w == 0 and nbytes % w == 0)
    return flat.view(_WORDS[width]).sum(dtype=torch.int64)


@dataclass(frozen=True)
class Difference:
    """A tensor whose copies differ. `wrong` are the ranks outvoted; empty when there is no majority."""

    name: str
    wrong: tuple[int, ...]
    holders: tuple[int, ...]

    @property
    def reporter(self) -> int:
        """The one rank of the holders that says so."""
        return (self._right if self.wrong else self.holders)[0]

    def describe(self) -> str:
        if not self.wrong:
            return f"{self.name} differs between ranks {_listed(self.holders)}, and no majority says which is right"
        return f"{self.name} on rank {_listed(self.wrong)} differs from its copies on {_listed(self._right)}"

    @property
    def _right(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.holders if rank not in self.wrong)


def _listed(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown


class Copies:
    """Compares and repairs what `state` returns: live tensors by name, the same names on every process that shares a
    pipeline stage. All processes call `compare` together."""

    def __init__(self, state: Callable[[], Mapping[str, Tensor]], processes: Processes) -> None:
        self._state, self._processes = state, processes
        self._groups = _groups(processes, {_copied_on(tensor, processes) for tensor in state().values()})

    def compare(self) -> list[Difference]:
        """What differs among the copies that this process holds one of; those with a majority are right afterwards."""
        found = []
        state = self._state()
        for axes, mesh in self._groups:
            names = [name for name, tensor in state.items() if _copied_on(tensor, self._processes) == axes]
            if names:
                found += self._compare(names, state, mesh)
        return found

    def _compare(self, names: list[str], state: Mapping[str, Tensor], mesh: DeviceMesh) -> list[Difference]:
        group = mesh.get_group()
        mine = torch.stack([digest(state[name]) for name in names]).to(self._processes.exchange_device)
        rows = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(rows, mine, group=group)
        votes, ranks = torch.stack(rows).cpu(), dist.get_process_group_ranks(group)
        differing = (votes != votes[0]).any(0).nonzero().flatten().tolist()
        return [self._settle(names[at], votes[:, at].tolist(), ranks, state, group) for at in differing]

    def _settle(
        self, name: str, votes: list[int], ranks: list[int], state: Mapping[str, Tensor], group: dist.ProcessGroup
    ) -> Difference:
        value, count = Counter(votes).most_common(1)[0]
        if 2 * count <= len(votes):
            return Difference(name, (), tuple(ranks))
        wrong = tuple(rank for rank, vote in zip(ranks, votes, strict=True) if vote != value)
        mine = local(state[name].detach())
        sent = mine.to(self._processes.exchange_device, copy=True)
        dist.broadcast(sent, ranks[votes.index(value)], group=group)
        mine.copy_(sent)
        return Difference(name, wrong, tuple(ranks))


def _copied_on(tensor: Tensor, processes: Processes) -> tuple[str, ...]:
    """Axes along which processes hold the same part of a tensor."""
    split = sharded_axes(tensor)
    return tuple(axis for axis in COPY_AXES if axis not in split and getattr(processes.layout, axis) > 1)


def _groups(processes: Processes, here: set[tuple[str, ...]]) -> list[tuple[tuple[str, ...], DeviceMesh]]:
    """A mesh for every set of axes that some process needs, made by all of them in one order."""
    active = [axis for axis in COPY_AXES if getattr(processes.layout, axis) > 1]
    sets = [axes for size in range(1, len(active) + 1) for axes in combinations(active, size)]
    wanted = processes.sum(torch.tensor([float(axes in here) for axes in sets], device=processes.device))
    meshes = [(axes, processes.mesh(*axes)) for axes, count in zip(sets, wanted.tolist(), strict=True) if count]
    return [(axes, mesh) for axes, mesh in meshes if mesh is not None]
