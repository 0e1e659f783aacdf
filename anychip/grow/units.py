"""The grown checkpoint as files that are made independently of each other: what several processes share, and what a
killed growth need not make again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from anychip.files import write_text
from anychip.grow.plan import GrowthPlan
from anychip.grow.rows import Kind
from anychip.grow.source import CheckpointRows
from anychip.grow.state import grown_names
from anychip.grow.tensors import grown_step, grown_strips, row_blocks
from anychip.train.checkpoint.manifest import DTYPES, Chunk, FileEntry, Manifest, TensorEntry
from anychip.train.checkpoint.plan import Box
from anychip.train.checkpoint.shard import ShardReader, ShardWriter, header_bytes

FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Piece:
    """A block of a grown tensor: one chunk of a file."""

    kind: Kind
    parameter: str
    rows: range
    box: Box


@dataclass(frozen=True)
class Unit:
    """One file."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return f"rank-0000-{self.number:04d}.safetensors"

    @property
    def nbytes(self) -> int:
        return sum(piece.box.nbytes for piece in self.pieces)


class Written(BaseModel):
    """What is known of a finished file; kept beside it until the checkpoint is published."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    entry: FileEntry
    chunks: list[tuple[str, Chunk]]


def units(plan: GrowthPlan, manifest: Manifest, file_bytes: int = FILE_BYTES) -> list[Unit]:
    """All files of the grown checkpoint; a function of plan and source alone, not of who makes them."""
    found: list[Unit] = []
    pieces: list[Piece] = []
    size = 0
    for piece in _pieces(plan, manifest):
        if pieces and size + piece.box.nbytes > file_bytes:
            found.append(Unit(len(found), tuple(pieces)))
            pieces, size = [], 0
        pieces.append(piece)
        size += piece.box.nbytes
    return [*found, Unit(len(found), tuple(pieces))]


def _pieces(plan: GrowthPlan, manifest: Manifest) -> Iterator[Piece]:
    for kind, name, shape in grown_names(plan, manifest.tensors.__contains__):
        parent = manifest.tensors.get(f"{kind}.{plan.parent_of(name)}")
        dtype = parent.dtype if parent is not None else "F32"
        key = f"{kind}.{name}"
        if kind == "optimizer.step":
            yield Piece(kind, name, range(0), Box(key, dtype, (), (), ()))
            continue
        for rows in row_blocks(shape):
            offsets = (rows.start, *(0 for _ in shape[1:]))
            yield Piece(kind, name, rows, Box(key, dtype, shape, offsets, (len(rows), *shape[1:])))


def write_unit(
    plan: GrowthPlan, unit: Unit, old: CheckpointRows, directory: Path, notes: Path, wrote: Callable[[int], None]
) -> None:
    """Make one file, flushed, and note that it is finished; `wrote` is told the bytes of each block. It is not read
    back, which would take as long again: it can be made anew from the old checkpoint, which stays, and whoever opens
    the grown one checks every byte."""
    (directory / unit.name).unlink(missing_ok=True)  # of a process that was killed
    room = header_bytes([piece.box for piece in unit.pieces])
    with ShardWriter(directory, unit.name, room, read_back=False) as writer:
        for piece in unit.pieces:
            dtype = DTYPES[piece.box.dtype]
            writer.add_rows(piece.box, (value.to(dtype) for value in _values(plan, piece, old)))
            wrote(piece.box.nbytes)
        entry = writer.finish()
        written = Written(entry=entry, chunks=[(box.name, chunk) for box, chunk in writer.chunks])
    write_text(_note(notes, unit), written.model_dump_json())


def _values(plan: GrowthPlan, piece: Piece, old: CheckpointRows) -> Iterator[Tensor]:
    if piece.kind != "optimizer.step":
        yield from grown_strips(plan, piece.kind, piece.parameter, piece.rows, old)
        return
    parent = f"{piece.kind}.{plan.parent_of(piece.parameter)}"
    yield grown_step(plan, piece.parameter, old.scalar(parent) if old.has(parent) else None)


def finished(unit: Unit, directory: Path, notes: Path) -> Written | None:
    """The note of a file that is there whole; None when it has to be made."""
    try:
        written = Written.model_validate_json(_note(notes, unit).read_text(encoding="utf-8"))
        with ShardReader(directory) as reader:
            reader.check_file(unit.name, written.entry)
    except Exception:  # whatever is wrong with it, it is made again
        return None
    return written


def joined(step: int, extra: dict[str, object], parts: list[Unit], directory: Path, notes: Path) -> Manifest:
    """The manifest of all files."""
    chunks: dict[str, list[Chunk]] = {}
    shapes: dict[str, Box] = {}
    files: dict[str, FileEntry] = {}
    for unit in parts:
        written = finished(unit, directory, notes)
        assert written is not None, unit.name
        files[unit.name] = written.entry
        shapes |= {piece.box.name: piece.box for piece in unit.pieces}
        for name, chunk in written.chunks:
            chunks.setdefault(name, []).append(chunk)
    tensors = {
        name: TensorEntry(dtype=box.dtype, shape=list(box.shape), chunks=sorted(chunks[name], key=lambda c: c.offsets))
        for name, box in shapes.items()
    }
    return Manifest.model_validate({"step": step, "extra": extra, "files": files, "tensors": tensors})


def _note(notes: Path, unit: Unit) -> Path:
    return notes / f"{unit.number:06d}.json"
