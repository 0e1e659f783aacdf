"""A document, and the table of names and sizes that lies beside a packed corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from anychip.errors import InputError
from anychip.files import atomic_writer

_MAGIC = b"ANYDOCS\x01"
_HEADER_BYTES = len(_MAGIC) + 8


@dataclass(frozen=True)
class Document:
    """One text. `id` is stable: the source's name, the path inside it, and a row where a file holds several."""

    id: str
    text: str
    source: str


def write_document_table(path: Path, ids: Sequence[bytes], text_bytes: npt.NDArray[np.int64]) -> None:
    """Write the UTF-8 `ids` and the text sizes of `n` documents.

    Layout, little-endian: 8 bytes of magic, int64 n, int64[n + 1] offsets into the names, int64[n] UTF-8 bytes of
    each document's text, then the names one after another.
    """
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))
    with atomic_writer(path) as handle:
        _write_columns(handle, sizes, text_bytes)
        handle.writelines(ids)


def join_document_tables(tables: Sequence[DocumentTable], path: Path) -> None:
    """Write one table with the documents of all tables, in order."""
    none = np.empty(0, np.int64)
    sizes = np.concatenate([none, *(table.name_bytes for table in tables)])
    text_bytes = np.concatenate([none, *(table.text_bytes for table in tables)])
    with atomic_writer(path) as handle:
        _write_columns(handle, sizes, text_bytes)
        for table in tables:
            handle.write(table.names)


def _write_columns(handle: IO[bytes], name_bytes: npt.NDArray[np.int64], text_bytes: npt.NDArray[np.int64]) -> None:
    offsets = np.zeros(len(name_bytes) + 1, dtype="<i8")
    np.cumsum(name_bytes, out=offsets[1:])
    handle.write(_MAGIC + len(name_bytes).to_bytes(8, "little"))
    handle.write(offsets.tobytes())
    handle.write(text_bytes.astype("<i8").tobytes())


class DocumentTable:
    """Memory-mapped names and sizes of the documents of one packed corpus."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError):
            raise self._broken("cannot be read or is empty") from None
        if self._data.size < _HEADER_BYTES or self._data[: len(_MAGIC)].tobytes() != _MAGIC:
            raise self._broken("is not a document table")
        count = int.from_bytes(self._data[len(_MAGIC) : _HEADER_BYTES].tobytes(), "little", signed=True)
        names_start = _HEADER_BYTES + (2 * count + 1) * 8
        if count < 0 or names_start > self._data.size:
            raise self._broken(f"announces {count} documents, more than its size allows")
        integers = np.frombuffer(self._data, dtype="<i8", offset=_HEADER_BYTES, count=2 * count + 1)
        self._offsets = integers[: count + 1]
        self.text_bytes: npt.NDArray[np.int64] = integers[count + 1 :]
        self.names = self._data[names_start:]
        rising = bool(np.all(np.diff(self._offsets) >= 0))
        if self._offsets[0] != 0 or not rising or int(self._offsets[-1]) != self.names.size:
            raise self._broken("has name offsets that do not fit its size")

    @property
    def name_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 size of each id."""
        return np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self.text_bytes)

    def id(self, index: int) -> str:
        """The id of document `index`."""
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self.names[start:end].tobytes().decode("utf-8", "replace")

    def find(self, document_id: str) -> int | None:
        """The index of the document with this id, or None."""
        wanted = document_id.encode()
        fitting = np.flatnonzero(self.name_bytes == len(wanted))
        for index in fitting:
            start = int(self._offsets[index])
            if self.names[start : start + len(wanted)].tobytes() == wanted:
                return int(index)
        return None

    def _broken(self, what: str) -> InputError:
        return InputError(f"{what}.", where=self.path, do="Pack the corpus again: remove the file and run `data`.")
