"""What a file of weights is to the rest of this room: names, shapes, and one tensor at a time."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from anychip.errors import InputError

MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file: `start` in bytes from the file's beginning, row-major elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile(Protocol):
    """A file of named tensors whose directory has been checked against its size."""

    @property
    def path(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...


def checked_shape(shape: object, what: str, path: Path) -> tuple[int, ...]:
    """A shape from a file, or InputError when it is none."""
    lengths = tuple(shape) if isinstance(shape, list | tuple) else (-1,)
    if len(lengths) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in lengths):
        raise InputError(f"gives {what} an impossible shape.", where=path, do="Download the file again.")
    if math.prod(lengths) >= MAX_ELEMENTS:
        raise InputError(f"gives {what} the impossible shape {list(lengths)}.", where=path, do="Download it again.")
    return lengths


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, opened for reading; InputError otherwise."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}).", where=path, do="Check the download.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("is not a regular file.", where=path, do="Check the download.")
    return descriptor


def read_tensor(file: WeightFile, name: str) -> Tensor:
    """Read one tensor into memory of its own."""
    entry = file.entries[name]
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if entry.nbytes == 0:
        return tensor
    data = tensor.view(-1).view(torch.uint8).numpy().data
    descriptor, position = open_regular(file.path), 0
    try:
        while position < len(data):
            count = os.preadv(descriptor, [data[position : position + (1 << 26)]], entry.start + position)
            if count == 0:
                raise InputError(f"ends inside the tensor {name}.", where=file.path, do="Download it again.")
            position += count
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}).", where=file.path) from None
    finally:
        os.close(descriptor)
    return tensor
