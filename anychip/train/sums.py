"""Gradients that are added up must be the sum of what backward computed. A bit that turns over in a buffer between the
two, in the sum or on its way is the same on all copies afterwards, and a pass that is computed again does not show it.

So a step that is checked sketches every gradient when it is computed, when this process has all of its own, and when
the sum is there: a few sums over its elements with random signs. Sketches add up as gradients do (the checksum of
Huang and Abraham, IEEE Trans. Comput. C-33, 1984, with random signs). What remains is rounding, which signs that know
nothing of the data turn into a random walk: by Hoeffding's inequality it goes `_SURE` times as far once in 10^13 sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from anychip.model.arithmetic import is_routing_bias
from anychip.parallel.data import READING_AXES, is_sharded_by_fsdp
from anychip.parallel.gradients import sharded_axes
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local
from anychip.train.copies import list_suspects, meshes_over, share_suspects
from anychip.train.engine import Engine
from anychip.train.prints import hooked

_COLUMNS = 64
_STRIP = 1 << 16  # rows of a gradient that are read at once
_SURE = 8.0
_SEED = 20_250_101


@dataclass(frozen=True)
class SumFault:
    """A sum of gradients that is not one. `tensor` differs most here, by `distance` of its norm (nothing: elsewhere).
    `suspects`, everywhere the same: whose own gradients changed in memory, else whose sum is wrong, with their nodes.
    """

    tensor: str
    distance: float
    in_memory: bool
    suspects: Mapping[int, str]

    def describe(self) -> str:
        what = "changed in memory before they were summed" if self.in_memory else "are not the sum of what was computed"
        return f"gradients {what} ({list_suspects(self.suspects)})"

    def rows(self, rank: int) -> list[dict[str, object]]:
        """What this rank has to write down."""
        if rank != min(self.suspects):
            return []
        return [{"ranks": list(self.suspects), "tensor": self.tensor, "distance": self.distance}]


class SumCheck:
    """Checks the sum of a step's gradients. All processes do the same: `watch` around each pass, `before_sum` when
    gradients are complete here, `fault` when they are summed."""

    def __init__(self, engine: Engine, processes: Processes) -> None:
        self._engine, self._processes = engine, processes
        self._learned = {name: p for name, p in engine.trainable.items() if not is_routing_bias(name)}
        self._axes = {name: self._summed_over(parameter) for name, parameter in self._learned.items()}
        self._meshes = meshes_over(processes, set(self._axes.values()))
        self._shards = processes.group("shard", "context")
        self._wide = torch.float64 if processes.device.type == "cpu" else torch.float32
        self.make_room(max((p.numel() for p in self._learned.values()), default=0))
        self._forget()

    def make_room(self, largest: int) -> None:
        """Draw the signs for gradients of so many elements."""
        self._signs = _signs(largest // _COLUMNS + 2, self._processes.device)

    def _forget(self) -> None:
        """Sums of signed elements and of norms a column, [parameters, 2, columns], of what was computed here."""
        shape = (len(self._learned), 2, _COLUMNS)
        self._computed = torch.zeros(shape, dtype=self._wide, device=self._processes.device)
        self._changed = torch.zeros(len(self._learned), dtype=self._wide, device=self._processes.device)
        self._lengths: dict[str, int] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around one pass."""
        found: dict[str, Tensor] = {}

        def note(name: str, gradient: Tensor) -> None:
            if name in self._learned:
                part = local(gradient.detach())
                found[name], self._lengths[name] = self.sketch(part), len(part)

        with hooked(self._engine, note):
            yield
        for at, name in enumerate(self._learned):
            if name in found:
                self._computed[at] += found[name]

    def before_sum(self) -> None:
        """This process's gradients are complete, and nobody else's are in them; FSDP has summed its own by now."""
        for at, parameter in enumerate(self._learned.values()):
            if parameter.grad is not None and not is_sharded_by_fsdp(parameter):
                here = self.sketch(local(parameter.grad))
                self._changed[at] = self.distance(self._computed[at], here, parameter, self._engine.passes - 1)

    def fault(self) -> SumFault | None:
        """What is wrong with the sums that are there now, the same verdict on all processes."""
        computed, found = self._sum_over_readers(), self._results()
        wrong = torch.stack(
            [
                self.distance(computed[at], found[at], parameter, self._additions(name))
                for at, (name, parameter) in enumerate(self._learned.items())
            ]
        )
        changed = self._changed
        self._forget()
        if not self._processes.any(bool((wrong > 0).any() or (changed > 0).any())):
            return None
        in_memory = self._processes.any(bool((changed > 0).any()))
        mine = changed if in_memory else wrong
        distance, at = mine.max(0)
        suspects = share_suspects([self._processes.rank] if distance > 0 else [], self._processes)
        return SumFault(list(self._learned)[int(at)], float(distance), in_memory, suspects)

    def _summed_over(self, parameter: Tensor) -> tuple[str, ...]:
        """Axes over which processes compute a part of a parameter's gradient each."""
        split = set() if is_sharded_by_fsdp(parameter) else sharded_axes(parameter)
        axes = [axis for axis in READING_AXES if axis not in split]
        if isinstance(parameter, DTensor) and "tensor" not in sharded_axes(parameter):
            axes.append("tensor")
        return tuple(axis for axis in axes if getattr(self._processes.layout, axis) > 1)

    def _additions(self, name: str) -> int:
        """How many numbers an element of a summed gradient was added to."""
        degrees = (getattr(self._processes.layout, axis) for axis in self._axes[name])
        return self._engine.passes * torch.Size(degrees).numel() - 1

    def _sum_over_readers(self) -> Tensor:
        total = self._computed.to(self._processes.exchange_device, copy=True)
        for axes, mesh in self._meshes:
            rows = [at for at, name in enumerate(self._learned) if self._axes[name] == axes]
            if rows:
                part = total[rows]
                dist.all_reduce(part, group=mesh.get_group())
                total[rows] = part
        return total.to(self._processes.device)

    def _results(self) -> Tensor:
        """Sketches of the gradients as they are now, those of shards added up."""
        results = torch.zeros_like(self._computed)
        sharded = []
        for at, (name, parameter) in enumerate(self._learned.items()):
            if parameter.grad is None:
                continue
            shards = is_sharded_by_fsdp(parameter)
            results[at] = self.sketch(local(parameter.grad), self._start(name, parameter) if shards else 0)
            sharded += [at] * shards
        if sharded and self._shards is not None:
            part = results[sharded].to(self._processes.exchange_device)
            dist.all_reduce(part, group=self._shards)
            results[sharded] = part.to(self._processes.device)
        return results

    def _start(self, name: str, parameter: Tensor) -> int:
        """Where FSDP's part begins in a gradient that was computed whole: rows are dealt out as `torch.chunk` does."""
        layout, place = self._processes.layout, self._processes.place
        rows = self._lengths.get(name, 0)
        chunk = -(-rows // (layout.shard * layout.context))
        first = min(rows, chunk * (place.shard * layout.context + place.context))
        return first * local(parameter.detach())[:1].numel()

    def distance(self, computed: Tensor, found: Tensor, parameter: Tensor, additions: int) -> Tensor:
        """By what share of its norm a gradient is off, beyond rounding; 0: it is not. What is not finite is the guard's
        to judge."""
        norms = torch.maximum(computed[1], found[1])
        apart = (computed[0] - found[0]).abs()
        of_sketches = 16 * torch.finfo(self._wide).eps if additions else 0.0  # without, both are of the same bits
        rounding = torch.finfo(parameter.dtype).eps / 2 * sqrt(additions) + of_sketches
        share = apart.amax() / norms.square().sum().sqrt().clamp(min=torch.finfo(self._wide).tiny)
        return torch.where((apart > _SURE * rounding * norms).any(), share, 0.0)

    def sketch(self, part: Tensor, start: int = 0) -> Tensor:
        """[2, columns]: every 64th element added up with random signs, and its norm. `start` is where the first element
        of `part` lies in the whole gradient."""
        flat = part.reshape(-1)
        before = start % _COLUMNS
        after = -(before + flat.numel()) % _COLUMNS
        if before or after:
            flat = torch.nn.functional.pad(flat, (before, after))
        rows = flat.view(-1, _COLUMNS)
        signs = self._signs[start // _COLUMNS :][: len(rows)]
        sums, squares = torch.zeros(2, _COLUMNS, dtype=self._wide, device=flat.device)
        for strip, sign in zip(rows.split(_STRIP), signs.split(_STRIP), strict=True):
            sums += (strip * sign).sum(0, dtype=self._wide)
            squares += torch.linalg.vector_norm(strip, dim=0, dtype=self._wide).square()
        return torch.stack((sums, squares.sqrt()))


def _signs(rows: int, device: torch.device) -> Tensor:
    """The same on every process, int8 [rows, 1]."""
    drawn = torch.randint(0, 2, (rows, 1), dtype=torch.int8, generator=torch.Generator().manual_seed(_SEED))
    return (2 * drawn - 1).to(device)
