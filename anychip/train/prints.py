"""Fingerprints of the gradients of one backward pass, taken before anything is added to them.

Each gradient leaves a digest, equal when all bits are, and a sketch that tells how far two gradients lie apart. No
gradient is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from anychip.parallel.gradients import sharded_axes
from anychip.parallel.tensor import local
from anychip.train.copies import digest
from anychip.train.engine import Engine

_COLUMNS = 32


@dataclass(frozen=True)
class Print:
    """Of n gradients in the order of the model's parameters: digests [n] int64, sketches [n, 33] fp64 (chips: fp32)."""

    digests: Tensor
    sketches: Tensor

    def distances(self, other: Print) -> Tensor:
        """How far each pair of gradients lies apart over the larger norm, [n]; a lower bound, inf where one is NaN.

        Columns add up every 32nd element: an element that is wrong by d moves one column by d.
        """
        mine, theirs = self.sketches, other.sketches
        apart = (mine[:, :-1] - theirs[:, :-1]).abs().amax(1)
        norms = torch.maximum(mine[:, -1], theirs[:, -1]).clamp(min=torch.finfo(mine.dtype).tiny)
        return (apart / norms).nan_to_num(nan=torch.inf)

    def differing(self, other: Print, tolerance: float) -> Tensor:
        """Which gradients differ, [n] bool. Tolerance 0: in any bit; else by more than that share of their norm."""
        bits = self.digests != other.digests
        return bits & (self.distances(other) > tolerance) if tolerance else bits

    def summary(self) -> Tensor:
        """One number for all digests, int64 [1]: another whenever one of them is."""
        odd = 2 * torch.arange(len(self.digests)) + 1
        return (self.digests * odd).sum().reshape(1)

    def gather(self, group: dist.ProcessGroup | None, device: torch.device) -> list[Print]:
        """Everyone's, in the order of ranks; its own alone without a group."""
        digests, sketches = (gather_rows(x, group, device) for x in (self.digests, self.sketches))
        return [Print(*pair) for pair in zip(digests, sketches, strict=True)]


def _is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def gather_rows(mine: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> list[Tensor]:
    """Everyone's tensor on the CPU, in the order of ranks."""
    if group is None:
        return [mine]
    sent = mine.to(device)
    rows = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(rows, sent, group=group)
    return [row.cpu() for row in rows]


@contextmanager
def hooked(engine: Engine, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Around one pass: `note` is called with the name of each parameter and the gradient that backward computed, also
    where FSDP then sums and shards it, and once more when layers are computed again. A pipeline's schedule may compute
    gradients of weights apart; they are read when it has ended."""
    if engine.pipelined:
        yield
        for name, parameter in engine.trainable.items():
            if parameter.grad is not None:
                note(name, parameter.grad)
        return
    sharded = any(map(_is_sharded, engine.parts))
    handles = _hook_shards(engine, note) if sharded else list(_hook(iter(engine.trainable.items()), note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(named: Iterator[tuple[str, nn.Parameter]], note: Callable[[str, Tensor], None]) -> Iterator[RemovableHandle]:
    for name, parameter in ((name, p) for name, p in named if p.requires_grad):
        yield parameter.register_hook(partial(note, name))


def _hook_shards(engine: Engine, note: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
    """FSDP puts whole parameters in a module's place before its forward: they are hooked there and then."""
    handles: list[RemovableHandle] = []

    def hook(prefix: str, module: nn.Module, inputs: object) -> None:
        whole = ((n, p) for n, p in module.named_parameters(prefix) if "shard" not in sharded_axes(p))
        handles.extend(_hook(whole, note))

    for part in engine.parts:
        for prefix, module in part.named_modules():
            if _is_sharded(module):
                handles.append(module.register_forward_pre_hook(partial(hook, prefix)))
    return handles


class Printer:
    """Takes the fingerprint of a pass of an engine."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._wide = torch.float64 if device.type == "cpu" else torch.float32
        self._noted: dict[str, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around one pass."""
        self._noted = {}
        with hooked(self._engine, self._note):
            yield

    def take(self) -> Print:
        """Of the pass watched last. Parameters without a gradient have zeros."""
        nothing = (
            torch.zeros((), dtype=torch.int64, device=self._device),
            self._sketch(torch.zeros(1, device=self._device)),
        )
        noted = [self._noted.get(name, nothing) for name in self._engine.trainable]
        return Print(*(torch.stack(column).cpu() for column in zip(*noted, strict=True)))

    def _note(self, name: str, gradient: Tensor) -> None:
        self._noted[name] = digest(gradient), self._sketch(local(gradient.detach()))

    def _sketch(self, part: Tensor) -> Tensor:
        flat = part.reshape(-1)
        whole_rows = flat.numel() // _COLUMNS * _COLUMNS
        columns = flat[:whole_rows].view(-1, _COLUMNS).sum(0, dtype=self._wide)
        rest = flat[whole_rows:]
        columns[: rest.numel()] += rest
        norm = torch.linalg.vector_norm(flat, dtype=self._wide)
        return torch.cat((columns, norm.reshape(1)))
