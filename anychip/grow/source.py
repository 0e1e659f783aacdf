"""Rows of the tensors of a checkpoint on disk, whatever layout it was written in, without reading the rest."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from anychip import alive
from anychip.errors import UnfitError
from anychip.grow.axes import Index
from anychip.train.checkpoint.manifest import Chunk, Manifest, TensorEntry

_MEAN_ROWS = 1 << 22
"""Elements read at a time for a mean."""


class CheckpointRows:
    """The rows (`grow.rows.Rows`) of a checkpoint that was verified when it was opened."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest = directory, manifest
        self._files: dict[str, int] = {}
        self._means: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        return name in self._manifest.tensors

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """See `Rows`. Each wanted row is read once."""
        entry = self._manifest.tensors[name]
        rising = bool((rows[1:] > rows[:-1]).all())
        wanted, places = (rows, None) if rising else rows.unique(return_inverse=True)
        found = torch.empty((len(wanted), *entry.shape[1:]), dtype=entry.torch_dtype)
        for chunk in entry.chunks:
            if chunk.nbytes:
                self._fill(found, wanted, chunk, entry)
        return found if places is None else found.index_select(0, places)

    def scalar(self, name: str) -> Tensor:
        """A tensor without dimensions."""
        entry = self._manifest.tensors[name]
        (chunk,) = entry.chunks
        value = torch.empty((), dtype=entry.torch_dtype)
        self._read(chunk, 0, value.view(1))
        return value

    def mean_row(self, name: str) -> Tensor:
        """See `Rows`; kept, because every block asks for it."""
        if name not in self._means:
            entry = self._manifest.tensors[name]
            total = torch.zeros(entry.shape[1:], dtype=torch.float64)
            step = max(1, _MEAN_ROWS // max(1, total.numel()))
            for start in range(0, entry.shape[0], step):
                part = torch.arange(start, min(start + step, entry.shape[0]))
                total += self.rows(name, part).double().sum(0)
            self._means[name] = (total / entry.shape[0]).to(entry.torch_dtype)
        return self._means[name]

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _fill(self, found: Tensor, wanted: Tensor, chunk: Chunk, entry: TensorEntry) -> None:
        """What of the wanted rows lies in one chunk."""
        first, size = chunk.offsets[0], chunk.sizes[0]
        begin, end = torch.searchsorted(wanted, torch.tensor([first, first + size])).tolist()
        others = [slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
        box = (slice(None), *others)
        whole = list(chunk.sizes[1:]) == list(entry.shape[1:])
        row_bytes = chunk.nbytes // size
        for start, run in Index(wanted[begin:end]).runs:
            target = found[begin : begin + run]
            place = (start - first) * row_bytes
            if whole:
                self._read(chunk, place, target)
            else:
                part = torch.empty((run, *chunk.sizes[1:]), dtype=found.dtype)
                self._read(chunk, place, part)
                target[box] = part
            begin += run

    def _read(self, chunk: Chunk, place: int, into: Tensor) -> None:
        if chunk.file not in self._files:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            self._files[chunk.file] = os.open(self._directory / chunk.file, flags)
        data = into.reshape(-1).view(torch.uint8).numpy().data
        position = 0
        while position < len(data):
            count = os.preadv(self._files[chunk.file], [data[position:]], chunk.start + place + position)
            if count == 0:
                raise UnfitError(
                    "ends inside a tensor.", where=self._directory / chunk.file, do="This checkpoint is damaged."
                )
            position += count
            alive.progressed()
