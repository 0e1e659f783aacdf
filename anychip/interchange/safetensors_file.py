"""Reading and writing safetensors files (8 bytes of header length, a JSON header, raw tensors).

The reader trusts nothing: the header's size, types, offsets, overlaps and gaps are checked against the file before any
tensor is read. The writer streams: it knows all shapes beforehand and writes each tensor as it comes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.errors import InputError
from anychip.files import atomic_writer
from anychip.interchange.source import TensorEntry, checked_shape, open_regular

MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """The checked directory of one file. Raises InputError naming what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if size < 8 or length > size - 8:
                raise self._bad(f"is truncated: its header needs {length + 8:,} bytes and the file has {size:,}")
            if length > MAX_HEADER_BYTES:
                raise self._bad(f"has a header of {length:,} bytes, above the limit of {MAX_HEADER_BYTES:,}")
            header = os.pread(descriptor, length, 8)
        except OSError as error:
            raise self._bad(f"cannot be read ({error.strerror})") from None
        finally:
            os.close(descriptor)
        self.entries = dict(self._entries(self._parse(header), 8 + length, size))

    def _bad(self, what: str) -> InputError:
        return InputError(f"{what}.", where=self.path, do="Download or export the file again.")

    def _parse(self, header: bytes) -> dict[str, Any]:
        def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len({name for name, _ in pairs}) != len(pairs):
                raise ValueError("a name stands in it twice")
            return dict(pairs)

        try:
            parsed = json.loads(header.decode("utf-8"), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"has a header that is not valid JSON ({str(error)[:80]})") from None
        if not isinstance(parsed, dict):
            raise self._bad("has a header that is not a JSON object")
        return parsed

    def _entries(self, header: dict[str, Any], data: int, size: int) -> Iterator[tuple[str, TensorEntry]]:
        ends = []
        for name, raw in header.items():
            if name == "__metadata__":
                continue
            if not isinstance(raw, dict) or not isinstance(raw.get("data_offsets"), list):
                raise self._bad(f"describes the tensor {name[:80]!a} wrongly")
            if not isinstance(raw.get("dtype"), str) or raw["dtype"] not in DTYPES:
                raise self._bad(f"stores {name[:80]!a} as {str(raw.get('dtype'))[:20]!a}, which is not supported")
            entry = TensorEntry(
                DTYPES[raw["dtype"]], checked_shape(raw.get("shape"), ascii(name[:80]), self.path), data
            )
            offsets = raw["data_offsets"]
            if len(offsets) != 2 or not all(isinstance(o, int) and not isinstance(o, bool) for o in offsets):
                raise self._bad(f"describes the place of {name[:80]!a} wrongly")
            start, end = offsets
            if not 0 <= start <= end <= size - data:
                raise self._bad(f"is truncated or wrong: {name[:80]!a} would not lie within its {size:,} bytes")
            if end - start != entry.nbytes:
                raise self._bad(f"gives {name[:80]!a} {end - start:,} bytes, its shape needs {entry.nbytes:,}")
            ends.append((start, end, name))
            yield name, TensorEntry(entry.dtype, entry.shape, data + start)
        position = 0
        for start, end, name in sorted(ends):
            if start != position:
                raise self._bad(f"has a gap or an overlap before {name[:80]!a}")
            position = end
        if position != size - data:
            raise self._bad(f"has {size - data - position:,} bytes that no tensor explains")


def write_safetensors(
    path: Path, shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """Write tensors of one dtype in the order of `shapes`, holding one at a time; the file appears when complete."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    expected = list(shapes)
    for name, shape in expected:
        end = position + TensorEntry(dtype, shape, 0).nbytes
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_writer(path) as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(expected, tensors, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {dtype} {shape}")
            handle.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
