"""Copies of the same weights and optimizer state must be the same bits. A chip that computes wrongly without saying so,
or a memory cell that turns over, makes them differ, and nothing else ever shows it.

Every process reduces its tensors to one number each; those that hold the same part exchange them, and the majority is
right. What has no copy is compared with itself: between two updates nothing may write it. What all copies share cannot
be seen so: a gradient that was wrong before it was summed (replay.py).
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from anychip.parallel.gradients import COPY_AXES, sharded_axes
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local

_NODE_NAME_BYTES = 64
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


@dataclass(frozen=True)
class Flip:
    """Memory that changed between two updates: `names` on this process, and everywhere the same, the ranks it happened
    on with the names of their nodes."""

    names: tuple[str, ...]
    suspects: Mapping[int, str]

    def describe(self) -> str:
        return f"weights or optimizer state changed in memory between two updates ({list_suspects(self.suspects)})"

    def rows(self, rank: int) -> list[dict[str, object]]:
        """What this rank has to write down."""
        return [{"ranks": [rank], "tensor": self.names[0]}] if self.names else []


def list_suspects(suspects: Mapping[int, str]) -> str:
    shown = ", ".join(f"rank {rank} on {node}" for rank, node in list(suspects.items())[:8])
    return f"{shown} and {len(suspects) - 8} more" if len(suspects) > 8 else shown


def share_suspects(mine: Iterable[int], processes: Processes) -> dict[int, str]:
    """The ranks that any process suspects, with the names of their nodes, the same on all processes."""
    table = torch.zeros(processes.layout.world_size, 1 + _NODE_NAME_BYTES)
    table[list(mine), 0] = 1.0
    node = platform.node().encode()[:_NODE_NAME_BYTES]
    table[processes.rank, 1 : 1 + len(node)] = torch.tensor(list(node), dtype=table.dtype)
    rows = processes.sum(table.to(processes.device)).cpu().to(torch.int64).tolist()
    return {
        rank: bytes(filter(None, letters)).decode(errors="replace")
        for rank, (votes, *letters) in enumerate(rows)
        if votes
    }


class Copies:
    """Compares and repairs what `state` returns: live tensors by name, the same names on every process that shares a
    pipeline stage. All processes call `compare` together."""

    def __init__(self, state: Callable[[], Mapping[str, Tensor]], processes: Processes) -> None:
        self._state, self._processes = state, processes
        self._groups = meshes_over(processes, {_copied_on(tensor, processes) for tensor in state().values()})
        self._latest: dict[str, Tensor] = {}
        self._watched = False

    def compare(self) -> list[Difference]:
        """What differs among the copies that this process holds one of; those with a majority are right afterwards."""
        found = []
        state = self._state()
        self._latest, self._watched = {name: digest(tensor) for name, tensor in state.items()}, False
        for axes, mesh in self._groups:
            names = [name for name, tensor in state.items() if _copied_on(tensor, self._processes) == axes]
            if names:
                found += self._compare(names, state, mesh)
        return found

    def watch(self, equal: bool) -> None:
        """If all copies were equal in the last comparison, nothing may write them from here to `flipped`."""
        self._watched = equal

    def flipped(self) -> Flip | None:
        """What is not as it was when `watch` was called, asked before the next update; None when nothing is, on all
        processes. Flips during the update itself, and between updates that are not watched, go unseen."""
        if not self._watched:
            return None
        self._watched = False
        state = self._state()
        now = torch.stack([digest(tensor) for tensor in state.values()])
        changed = (now != torch.stack([self._latest[name] for name in state])).cpu().tolist()
        names = tuple(name for name, differs in zip(state, changed, strict=True) if differs)
        if not self._processes.any(bool(names)):
            return None
        return Flip(names, share_suspects([self._processes.rank] if names else [], self._processes))

    def _compare(self, names: list[str], state: Mapping[str, Tensor], mesh: DeviceMesh) -> list[Difference]:
        group = mesh.get_group()
        mine = torch.stack([self._latest[name] for name in names]).to(self._processes.exchange_device)
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


def meshes_over(processes: Processes, here: set[tuple[str, ...]]) -> list[tuple[tuple[str, ...], DeviceMesh]]:
    """A mesh for every set of axes that some process needs, made by all of them in one order."""
    active = [axis for axis in COPY_AXES if getattr(processes.layout, axis) > 1]
    sets = [axes for size in range(1, len(active) + 1) for axes in combinations(active, size)]
    wanted = processes.sum(torch.tensor([float(axes in here) for axes in sets], device=processes.device))
    meshes = [(axes, processes.mesh(*axes)) for axes, count in zip(sets, wanted.tolist(), strict=True) if count]
    return [(axes, mesh) for axes, mesh in meshes if mesh is not None]
