"""One process's part of a copy, as it lies in a host's memory: a shard file, and a record that is written last.

    FOLDER/step-000120-ATTEMPT/{rank-0000.safetensors, rank-0000.json, rank-0002.safetensors, rank-0002.json}

A record holds the digests of its shard and begins with its own. A part without a good record is not there. Each part
describes itself alone, so that while training goes on no process gathers what all others wrote; only when a copy is
read are its records joined to a manifest such as a checkpoint on disk has.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from torch import Tensor

from anychip.errors import UnfitError
from anychip.train.checkpoint.directory import step_name
from anychip.train.checkpoint.manifest import (
    LARGEST_MANIFEST_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    Size,
    TensorEntry,
    TensorName,
)
from anychip.train.checkpoint.plan import Box, SaveParts
from anychip.train.checkpoint.shard import ShardReader, ShardWriter, header_bytes

ATTEMPT_DIGITS = 24
_COPY_NAME = re.compile(rf"step-\d{{6,15}}-[0-9a-f]{{{ATTEMPT_DIGITS}}}")
_RECORD_NAME = re.compile(r"rank-(\d{4,8})\.json")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredBox(_Strict):
    """A box of a tensor of this global shape, and where its bytes lie."""

    name: TensorName
    dtype: str
    shape: list[Size]
    chunk: Chunk


class PartRecord(_Strict):
    """What `rank` of `world_size` wrote of one copy; `file` is None when it had nothing to write."""

    step: Size
    attempt: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{ATTEMPT_DIGITS}}}$")]
    rank: Size
    world_size: Size
    extra: dict[str, JsonValue]
    file: FileEntry | None
    boxes: list[StoredBox]

    @model_validator(mode="after")
    def _speaks_of_its_own_file(self) -> PartRecord:
        if self.rank >= self.world_size or any(box.chunk.file != shard_name(self.rank) for box in self.boxes):
            raise ValueError("the record speaks of another part")
        return self

    def to_bytes(self) -> bytes:
        """Canonical bytes: equal records are equal files."""
        text = self.model_dump_json().encode()
        return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def copy_name(step: int, attempt: str) -> str:
    return f"{step_name(step)}-{attempt}"


def step_of(copy: str) -> int:
    return int(copy.split("-")[1])


def shard_name(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def record_name(rank: int) -> str:
    return f"rank-{rank:04d}.json"


def incoming(directory: Path, name: str) -> Path:
    """Where a file lies that comes from another host: a record is hidden until its part is found to be good."""
    return directory / (f".{name}" if name.endswith(".json") else name)


def write_part(
    directory: Path,
    step: int,
    attempt: str,
    place: tuple[int, int],
    extra: dict[str, JsonValue],
    parts: SaveParts,
    tensor: Callable[[Box], Tensor],
) -> PartRecord:
    """Write the part of this process, which is at `place` (rank, of how many), into `directory`.

    Raises OSError when the memory is full, UnfitError when it returns other bytes than were written.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    file, boxes = None, []
    if parts.boxes:
        with ShardWriter(directory, shard_name(place[0]), header_bytes(parts.boxes)) as writer:
            for box in parts.boxes:
                writer.add(box, tensor(box))
            file = writer.finish()
        boxes = [StoredBox(name=b.name, dtype=b.dtype, shape=list(b.shape), chunk=chunk) for b, chunk in writer.chunks]
    record = PartRecord(
        step=step, attempt=attempt, rank=place[0], world_size=place[1], extra=extra, file=file, boxes=boxes
    )
    hidden = incoming(directory, record_name(place[0]))
    hidden.write_bytes(record.to_bytes())
    hidden.rename(directory / record_name(place[0]))
    return record


def accept_part(directory: Path, rank: int) -> None:
    """Publish a part that came from another host. Raises UnfitError when it is not what was written there."""
    hidden = incoming(directory, record_name(rank))
    record = _read_record(hidden, directory.name)
    if record is None or record.rank != rank:
        raise UnfitError("is not a good record of a part.", where=hidden)
    damage = check_parts(directory, [record])
    if damage:
        raise UnfitError(damage[rank])
    hidden.rename(directory / record_name(rank))


def copies_in(folder: Path) -> list[Path]:
    """The directories of copies, whole or not."""
    return [path for path in folder.iterdir() if _COPY_NAME.fullmatch(path.name) and path.is_dir()]


def read_records(directory: Path) -> list[PartRecord]:
    """The good records of a copy, by rank; a bad one counts as none."""
    try:
        names = sorted(path.name for path in directory.iterdir() if _RECORD_NAME.fullmatch(path.name))
    except OSError:
        return []
    found = (_read_record(directory / name, directory.name) for name in names)
    return [record for record, name in zip(found, names, strict=True) if record and record_name(record.rank) == name]


def check_parts(directory: Path, records: Iterable[PartRecord], share: int = 0, shares: int = 1) -> dict[int, str]:
    """Compare every `shares`-th chunk from the `share`-th on with its digest; what is wrong, by rank of the part."""
    damage: dict[int, str] = {}
    with ShardReader(directory) as reader:
        for record in records:
            try:
                if record.file:
                    reader.check_file(shard_name(record.rank), record.file)
                for box in record.boxes[share::shares]:
                    reader.check_chunk(box.chunk)
            except UnfitError as error:
                damage[record.rank] = f"{error.where}: {error.what}"
    return damage


def join_records(records: Iterable[PartRecord]) -> Manifest:
    """The manifest of a copy, from the records of all its parts. Raises UnfitError when they do not fit together."""
    files: dict[str, FileEntry] = {}
    chunks: dict[str, list[Chunk]] = {}
    kinds: dict[str, tuple[str, list[int]]] = {}
    first = None
    for record in records:
        first = first or record
        if record.file:
            files[shard_name(record.rank)] = record.file
        for box in record.boxes:
            chunks.setdefault(box.name, []).append(box.chunk)
            kinds[box.name] = box.dtype, box.shape
    assert first is not None
    try:
        tensors = {
            name: TensorEntry(dtype=dtype, shape=shape, chunks=sorted(chunks[name], key=lambda c: tuple(c.offsets)))
            for name, (dtype, shape) in kinds.items()
        }
        return Manifest(step=first.step, extra=first.extra, files=files, tensors=tensors)
    except ValidationError as error:
        what = f"its parts do not fit together: {error.errors(include_url=False, include_input=False)[0]['msg']}."
        raise UnfitError(what, where=copy_name(first.step, first.attempt)) from error


def _read_record(path: Path, copy: str) -> PartRecord | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as handle:
            digest, _, text = handle.read(LARGEST_MANIFEST_BYTES).partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            return None
        record = PartRecord.model_validate_json(text)
    except (OSError, ValidationError):
        return None
    return record if copy_name(record.step, record.attempt) == copy else None
