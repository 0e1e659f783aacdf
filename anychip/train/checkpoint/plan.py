"""Who writes and who reads which part of which tensor: PyTorch DCP's planners, with JSON between the ranks.

DCP (torch.distributed.checkpoint) knows how DTensors of any layout map to boxes of the global tensor, which replica
writes, and which boxes of a checkpoint fill a tensor of another layout. Its storage and its pickles are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from anychip.errors import InputError
from anychip.train.checkpoint.manifest import DTYPE_NAMES, DTYPES, Chunk, Manifest, TensorEntry, tensor_name_problem
from anychip.train.checkpoint.ranks import Ranks


@dataclass(frozen=True)
class Box:
    """One rank's part of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.sizes) * DTYPES[self.dtype].itemsize

    @property
    def key(self) -> str:
        """The name in the shard file: the tensor's own when the whole tensor lies there."""
        return self.name if self.sizes == self.shape else f"{self.name}@{','.join(map(str, self.offsets))}"


class SaveParts:
    """What this rank writes: the boxes, and the tensor behind each."""

    def __init__(self, planner: DefaultSavePlanner, boxes: list[Box], every_box: list[Box]) -> None:
        self.boxes = sorted(boxes, key=lambda box: (-DTYPES[box.dtype].itemsize, box.name, box.offsets))
        self.every_box = every_box  # of all ranks, on the coordinator; elsewhere empty
        self._planner = planner

    @property
    def nbytes(self) -> int:
        return sum(box.nbytes for box in self.boxes)

    def of(self, state: Mapping[str, Tensor]) -> SaveParts:
        """The same parts of a later state of the same names, shapes and layouts; no rank needs to be asked."""
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(state))
        return SaveParts(planner, self.boxes, self.every_box)

    def tensor(self, box: Box) -> Tensor:
        """The live local tensor of a box: not a copy, any strides, any device."""
        return self._planner.lookup_object(MetadataIndex(box.name, box.offsets)).detach()


def plan_save(state: Mapping[str, Tensor], ranks: Ranks) -> SaveParts:
    """Divide `state` among the ranks; replicated tensors are written once. Called by all ranks together."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    local, problem = [], _unfit_state(state)
    if not problem:
        planner.set_up_planner(dict(state), is_coordinator=ranks.is_coordinator)
        local = [_box(item) for item in planner.create_local_plan().items]
        local = [box for box in local if box.nbytes or not prod(box.shape)]  # a rank may hold nothing of a small tensor
    told = ranks.gather([problem, [_as_list(box) for box in local]])
    plans = [[Box(*map(_tuple, box)) for box in boxes] for _, boxes in told]
    problem = next((text for text, _ in told if text), "")
    shares, problem = ranks.broadcast(_divide(planner, plans) if told and not problem else [[], problem])
    if problem:
        raise InputError(f"this state cannot be a checkpoint: {problem}.")
    keys = [{(name, tuple(offsets)) for name, offsets in share} for share in shares]
    mine = [box for box in local if (box.name, box.offsets) in keys[ranks.rank]]
    every = [
        box for boxes, share in zip(plans, keys, strict=False) for box in boxes if (box.name, box.offsets) in share
    ]
    return SaveParts(planner, mine, every)


def _divide(planner: DefaultSavePlanner, plans: list[list[Box]]) -> tuple[list[list[Any]], str]:
    """Which boxes (name, offsets) each rank writes, or what is wrong with them."""
    try:
        shares, _ = planner.create_global_plan([SavePlan([_write_item(box) for box in boxes]) for boxes in plans])
    except ValueError as error:
        return [], str(error)
    return [[(item.index.fqn, tuple(item.index.offset or ())) for item in share.items] for share in shares], ""


@dataclass(frozen=True)
class Copy:
    """Elements of one chunk, and the part of the destination that they fill."""

    source: tuple[slice, ...]
    target: Tensor


def plan_load(manifest: Manifest, into: Mapping[str, Tensor]) -> Iterator[tuple[Chunk, TensorEntry, list[Copy]]]:
    """The chunks needed to fill `into`, in the order of their bytes on disk, each with where its elements go."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    entries = {name: _without_empty_chunks(manifest.tensors[name]) for name in into}
    planner.set_up_planner(dict(into), _dcp_metadata(entries))
    copies: dict[tuple[str, tuple[int, ...]], list[Copy]] = {}
    for item in planner.create_local_plan().items:
        source = tuple(
            slice(offset, offset + size) for offset, size in zip(item.storage_offsets, item.lengths, strict=True)
        )
        copy = Copy(source, planner.resolve_tensor(item))
        copies.setdefault((item.storage_index.fqn, tuple(item.storage_index.offset or ())), []).append(copy)
    needed = [
        (chunk, entry, copies[name, tuple(chunk.offsets)])
        for name, entry in entries.items()
        for chunk in entry.chunks
        if (name, tuple(chunk.offsets)) in copies
    ]
    yield from sorted(needed, key=lambda row: (row[0].file, row[0].start))


def check_fits(manifest: Manifest, into: Mapping[str, Tensor], where: object, *, part: bool) -> None:
    """Raise InputError, listing names, unless `into` has the tensors of the checkpoint.

    Whole groups (the part of the name before the first dot, such as `optimizer`) may be left out, single tensors of a
    group may not, unless `into` is one process's `part` of a state, such as a pipeline stage.
    """
    groups = {name.split(".")[0] for name in into}
    missing = sorted(set(into) - set(manifest.tensors))
    others = set() if part else set(manifest.tensors) - set(into)
    unasked = sorted(name for name in others if name.split(".")[0] in groups)
    wrong = [
        f"{name} (checkpoint {entry.dtype} {entry.shape}, here {DTYPE_NAMES.get(tensor.dtype)} {list(tensor.shape)})"
        for name, tensor in sorted(into.items())
        if (entry := manifest.tensors.get(name))
        and (entry.torch_dtype != tensor.dtype or entry.shape != list(tensor.shape))
    ]
    problems = [
        *([f"it lacks {_some(missing)}"] if missing else []),
        *([f"it also holds {_some(unasked)}"] if unasked else []),
        *([f"it differs in {_some(wrong)}"] if wrong else []),
    ]
    if problems:
        do = "Use the recipe that the checkpoint was written with."
        raise InputError(f"does not fit this model or optimizer: {'; '.join(problems)}.", where=where, do=do)


def _unfit_state(state: Mapping[str, Tensor]) -> str:
    """What keeps `state` from being stored; empty when nothing does."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            return f"{name!r} is not a dense tensor with data"
        if tensor.dtype not in DTYPE_NAMES:
            return f"{name!r} has dtype {tensor.dtype}; possible are {', '.join(DTYPES)}"
        if problem := tensor_name_problem(name):
            return f"{name!r} {problem}"
    return ""


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _box(item: WriteItem) -> Box:
    data = item.tensor_data
    assert data is not None
    dtype = DTYPE_NAMES[data.properties.dtype]
    return Box(item.index.fqn, dtype, tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def _write_item(box: Box) -> WriteItem:
    data = TensorWriteData(
        ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)),
        TensorProperties(DTYPES[box.dtype]),
        torch.Size(box.shape),
    )
    kind = WriteItemType.TENSOR if box.sizes == box.shape else WriteItemType.SHARD
    return WriteItem(MetadataIndex(box.name, box.offsets), kind, tensor_data=data)


def _as_list(box: Box) -> list[Any]:
    return [box.name, box.dtype, box.shape, box.offsets, box.sizes]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _without_empty_chunks(entry: TensorEntry) -> TensorEntry:
    return entry.model_copy(update={"chunks": [chunk for chunk in entry.chunks if chunk.nbytes]})


def _dcp_metadata(entries: Mapping[str, TensorEntry]) -> Metadata:
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(entry.torch_dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks],
            )
            for name, entry in entries.items()
        }
    )
