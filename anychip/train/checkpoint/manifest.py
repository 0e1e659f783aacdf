"""What a checkpoint says of itself: which bytes of which file are which part of which tensor, and their digests.

The manifest is JSON and takes the place of PyTorch DCP's pickled `.metadata`. It is checked as a whole before any of it
is used: names, ranges and shapes must fit together, so that nothing read later can leave the directory, overlap, or be
missing.
"""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from anychip.errors import InputError

MANIFEST_NAME = "manifest.json"
LARGEST_MANIFEST_BYTES = 1 << 30

_SAFETENSORS_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {key: getattr(torch, name) for key, name in _SAFETENSORS_NAMES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Size = Annotated[int, Field(ge=0, le=1 << 62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TensorName = Annotated[str, Field(pattern=r"^[^\x00-\x1f@]+$", max_length=1024)]
FileName = Annotated[str, Field(pattern=r"^rank-[0-9]{4,8}(-[0-9]{4,8})?\.safetensors$")]

_TENSOR_NAME: TypeAdapter[str] = TypeAdapter(TensorName)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Chunk(_Part):
    """A box of a tensor, and where its bytes lie: `nbytes` from byte `start` of `file`, row-major, little-endian."""

    offsets: list[Size]
    sizes: list[Size]
    file: FileName
    start: Size
    nbytes: Size
    sha256: Sha256


class TensorEntry(_Part):
    """A tensor by its global shape; the chunks tile it exactly."""

    dtype: str
    shape: Annotated[list[Size], Field(max_length=64)]
    chunks: list[Chunk]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.torch_dtype.itemsize

    @model_validator(mode="after")
    def _chunks_tile_the_tensor(self) -> TensorEntry:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for chunk in self.chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(self.shape):
                raise ValueError(f"a chunk has another number of dimensions than the shape {self.shape}")
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            if any(end > size for end, size in zip(ends, self.shape, strict=True)):
                raise ValueError(f"the chunk at {chunk.offsets} sticks out of the shape {self.shape}")
            if chunk.nbytes != prod(chunk.sizes) * self.torch_dtype.itemsize:
                raise ValueError(f"the chunk at {chunk.offsets} has {chunk.nbytes} bytes for sizes {chunk.sizes}")
        if sum(chunk.nbytes for chunk in self.chunks) != self.nbytes or _overlap(self.chunks):
            raise ValueError(f"the chunks do not cover the shape {self.shape} exactly once")
        return self


class FileEntry(_Part):
    """A shard file: a safetensors header of `header_nbytes`, then the chunks without gaps."""

    nbytes: Size
    header_nbytes: Size
    header_sha256: Sha256


class Manifest(_Part):
    """A whole checkpoint."""

    format: Literal["anychip-checkpoint"] = "anychip-checkpoint"
    version: Literal[1] = 1
    step: Size
    extra: dict[str, JsonValue]
    files: dict[FileName, FileEntry]
    tensors: dict[TensorName, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def chunks(self) -> list[Chunk]:
        """All chunks in the order of their bytes in the files."""
        chunks = [chunk for tensor in self.tensors.values() for chunk in tensor.chunks]
        return sorted(chunks, key=lambda chunk: (chunk.file, chunk.start, chunk.nbytes))

    def to_json(self) -> bytes:
        """Canonical bytes: equal manifests are equal files."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @model_validator(mode="after")
    def _chunks_fill_the_files(self) -> Manifest:
        ends = {name: file.header_nbytes for name, file in self.files.items()}
        for chunk in self.chunks():
            if chunk.start != ends.get(chunk.file):
                raise ValueError(f"the chunks of {chunk.file} leave a gap or overlap at byte {chunk.start}")
            ends[chunk.file] += chunk.nbytes
        for name, file in self.files.items():
            if ends[name] != file.nbytes:
                raise ValueError(f"the chunks of {name} end at byte {ends[name]}, the file at {file.nbytes}")
        return self


def parse_manifest(text: bytes, where: object) -> Manifest:
    """Read a manifest from bytes of unknown origin. Raises InputError naming the first thing that is wrong."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"])) or "the whole file"
        raise InputError(f"is not a usable manifest: {at}: {first['msg']}.", where=where, do=_ANOTHER) from error


def checked_extra(extra: dict[str, Any]) -> dict[str, Any]:
    """A copy of `extra` as JSON gives it back. Raises InputError for what JSON cannot hold."""
    try:
        copy = json.loads(json.dumps(extra, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"`extra` of a checkpoint must be JSON: {error}.", do="Keep numbers, text, lists.") from error
    if copy != extra:
        raise InputError("`extra` of a checkpoint changes when written as JSON.", do="Use text keys and plain lists.")
    return dict(copy)


def tensor_name_problem(name: str) -> str:
    """What keeps `name` from naming a tensor of a checkpoint; empty when nothing does."""
    if name == "__metadata__":
        return "has the name that safetensors keeps for itself"
    try:
        _TENSOR_NAME.validate_python(name)
    except ValidationError as error:
        return f"cannot be named so: {error.errors(include_url=False)[0]['msg']}"
    return ""


_ANOTHER = "Use another checkpoint."


def _overlap(chunks: list[Chunk]) -> bool:
    """Whether two boxes share an element; empty boxes share none."""
    boxes = sorted((c for c in chunks if c.nbytes), key=lambda c: c.offsets)
    if boxes and not boxes[0].offsets:
        return len(boxes) > 1
    if all(a.offsets[0] + a.sizes[0] <= b.offsets[0] for a, b in pairwise(boxes)):
        return False
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            if other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                break
            if all(
                a < b + n and b < a + m
                for a, m, b, n in zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True)
            ):
                return True
    return False
