"""What a disk may hold after a power cut, from the trace of the calls before it.

A file keeps what it held when it was last flushed; of later writes any may be there, in part, or as zeros. A directory
keeps the entries that it had when it was last flushed; later changes may be there in their order, up to any of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_SECTOR = 512


@dataclass
class File:
    live: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)  # since the last flush


@dataclass
class Folder:
    live: dict[str, File | Folder] = field(default_factory=dict)
    flushed: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[dict[str, File | Folder]] = field(default_factory=list)  # entries after each change since then


@dataclass(frozen=True)
class Call:
    kind: str
    number: int
    offset: int
    path: str
    other: str
    data: bytes


def read_trace(path: Path) -> Iterator[Call]:
    """The changes that a traced process made, in order; kind X is a note of the test's own."""
    with path.open("rb") as handle:
        while line := handle.readline():
            kind, number, offset, length, name, other = line.decode().rstrip("\n").split("\t")
            data = handle.read(int(length)) if kind == "W" else b""
            yield Call(kind, int(number), int(offset), name, other, data)


class Disk:
    """A folder `root` whose calls are replayed; what it held `before` them is taken to be flushed."""

    def __init__(self, root: Path, before: Path) -> None:
        self._start = str(root.resolve())
        self._root = _flushed_copy(before)

    def replay(self, call: Call) -> None:
        if call.kind == "X":
            return
        parent, name = self._find(call.path)
        if call.kind == "S":
            self._flush(parent.live[name] if name else parent)
        elif call.kind == "W":
            file = parent.live[name]
            assert isinstance(file, File)
            file.live[len(file.live) : call.offset] = bytes(max(0, call.offset - len(file.live)))
            file.live[call.offset : call.offset + len(call.data)] = call.data
            file.writes.append((call.offset, call.data))
        elif call.kind == "T":
            file = parent.live[name]
            assert isinstance(file, File)
            assert call.offset == 0 and not file.live, "only new files are written"
        elif call.kind == "R":
            other_parent, other_name = self._find(call.other)
            assert other_parent is parent, "a rename between directories is two changes that need an order"
            parent.live[other_name] = parent.live.pop(name)
            parent.changes.append(dict(parent.live))
        else:
            if call.kind == "U":
                del parent.live[name]
            elif name not in parent.live:
                parent.live[name] = Folder() if call.kind == "M" else File()
            parent.changes.append(dict(parent.live))

    def leave(self, to: Path, chance: random.Random | None, *, entries_kept: bool = False) -> None:
        """Write what a power cut now may leave: with `chance` anything possible, without it the least (with
        `entries_kept` all entries and the least of the contents)."""
        _leave(self._root, to, chance, entries_kept)

    def _find(self, path: str) -> tuple[Folder, str]:
        parts = [part for part in path.removeprefix(self._start).split("/") if part]
        folder = self._root
        for part in parts[:-1]:
            inner = folder.live[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, parts[-1] if parts else ""

    def _flush(self, node: File | Folder) -> None:
        if isinstance(node, File):
            node.flushed, node.writes = bytes(node.live), []
        else:
            node.flushed, node.changes = dict(node.live), []


def _flushed_copy(path: Path) -> Folder:
    entries: dict[str, File | Folder] = {}
    for entry in path.iterdir():
        if entry.is_dir():
            entries[entry.name] = _flushed_copy(entry)
        else:
            data = entry.read_bytes()
            entries[entry.name] = File(bytearray(data), data)
    return Folder(entries, dict(entries))


def _leave(folder: Folder, to: Path, chance: random.Random | None, entries_kept: bool) -> None:
    to.mkdir(exist_ok=True)
    entries = folder.live if entries_kept else folder.flushed
    if chance is not None:
        entries = chance.choice([folder.flushed, *folder.changes])
    for name, node in entries.items():
        if isinstance(node, Folder):
            _leave(node, to / name, chance, entries_kept)
        else:
            (to / name).write_bytes(_left_of(node, chance))


def _left_of(file: File, chance: random.Random | None) -> bytes:
    data = bytearray(file.flushed)
    for offset, written in file.writes if chance is not None else ():
        assert chance is not None
        part = written[: chance.choice((0, chance.randrange(len(written) // _SECTOR + 1) * _SECTOR, len(written)))]
        if chance.random() < 0.2:
            part = bytes(len(part))
        if part:
            data[len(data) : offset] = bytes(max(0, offset - len(data)))
            data[offset : offset + len(part)] = part
    return bytes(data)
