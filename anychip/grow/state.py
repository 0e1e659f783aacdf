"""A state in memory, and what it grows into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from anychip.grow.plan import GrowthPlan
from anychip.grow.rows import KINDS, Kind, Rows
from anychip.grow.tensors import Shape, grown_step, grown_strips, row_blocks
from anychip.model.arithmetic import parameter_shapes
from anychip.train.optimizer import takes_muon


class MemoryRows:
    """Rows of tensors by state name (`model.NAME`, `optimizer.exp_avg.NAME`, ...)."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def rows(self, name: str, rows: Tensor) -> Tensor:
        return self._state[name].index_select(0, rows)

    def mean_row(self, name: str) -> Tensor:
        return self._state[name].double().mean(0).to(self._state[name].dtype)


class CastRows:
    """Another state's rows in another dtype."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        self._rows, self._dtype = rows, dtype

    def rows(self, name: str, rows: Tensor) -> Tensor:
        return self._rows.rows(name, rows).to(self._dtype)

    def mean_row(self, name: str) -> Tensor:
        return self._rows.mean_row(name).to(self._dtype)


def grown_names(plan: GrowthPlan, held: Callable[[str], bool]) -> Iterator[tuple[Kind, str, Shape]]:
    """(kind, parameter, shape) of every tensor of the grown state, in the order of the forward pass; `held` says which
    tensors the old state has, and so whether it has an optimizer, and which."""
    shapes = list(parameter_shapes(plan.new))
    muon = any(held(f"optimizer.momentum.{name}") for name, _ in parameter_shapes(plan.old))
    optimized = muon or held("optimizer.exp_avg.norm.weight")
    for kind in KINDS if optimized else KINDS[:1]:
        for name, shape in shapes:
            by_muon = muon and takes_muon(name)
            if kind == "model" or by_muon == (kind == "optimizer.momentum"):
                yield kind, name, () if kind == "optimizer.step" else shape


def grown_tensor(plan: GrowthPlan, kind: Kind, name: str, shape: Shape, old: Rows) -> Tensor:
    """A whole grown tensor."""
    return torch.cat([strip for rows in row_blocks(shape) for strip in grown_strips(plan, kind, name, rows, old)])


def grow_state(plan: GrowthPlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The grown state, by the same kinds of names."""
    old, grown = MemoryRows(state), {}
    for kind, name, shape in grown_names(plan, state.__contains__):
        grown[f"{kind}.{name}"] = (
            grown_step(plan, name, state.get(f"{kind}.{plan.parent_of(name)}"))
            if kind == "optimizer.step"
            else grown_tensor(plan, kind, name, shape, old)
        )
    return grown
