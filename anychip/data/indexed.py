"""Megatron's packed corpus: PREFIX.bin holds token ids one after another, PREFIX.idx says where sequences begin.

The .idx file, little-endian: 9 bytes `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64 sequences, uint64
document entries; then int32 lengths [sequences] in tokens, int64 pointers [sequences] in bytes into .bin, and int64
document entries: the first sequence of each document, and the number of sequences last. (Megatron-LM,
megatron/core/datasets/indexed_dataset.py.)
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from anychip.errors import InputError
from anychip.files import atomic_writer
from anychip.recipe.schema import SourceConfig

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_UINT16_VOCABULARY = 65_500
_CHECK_ROWS = 1 << 20

Tokens = npt.NDArray[np.int64]


def is_packed(source: SourceConfig) -> bool:
    """Whether a source names the prefix of a packed corpus instead of documents."""
    if source.format != "auto":
        return source.format == "megatron"
    prefix = Path(source.path).expanduser()
    return not prefix.exists() and idx_path(prefix).is_file()


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> str:
    """The smallest type that Megatron would choose for this vocabulary."""
    return "<u2" if vocab_size < _MAX_UINT16_VOCABULARY else "<i4"


def foreign_token(tokens: npt.NDArray[Any], vocab_size: int) -> int | None:
    """The first token id outside 0..vocab_size-1, or None."""
    if tokens.size and (tokens.max() >= vocab_size or tokens.min() < 0):
        return int(tokens[(tokens >= vocab_size) | (tokens < 0)][0])
    return None


def write_idx(prefix: Path, dtype: str, lengths: npt.NDArray[np.int32]) -> None:
    """Write PREFIX.idx for sequences of these lengths [n], each a document, that lie in .bin without gaps."""
    count = len(lengths)
    pointers = np.zeros(count, "<i8")
    np.cumsum(lengths[:-1], dtype="<i8", out=pointers[1:])
    pointers *= np.dtype(dtype).itemsize
    with atomic_writer(idx_path(prefix)) as handle:
        handle.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], count, count + 1))
        handle.write(lengths.astype("<i4").tobytes())
        handle.write(pointers.tobytes())
        handle.write(np.arange(count + 1, dtype="<i8").tobytes())


class IndexedWriter:
    """Writes documents of one sequence each. Nothing exists under the final names before the block ends well."""

    def __init__(self, prefix: Path, dtype: str) -> None:
        self.prefix, self.dtype = prefix, dtype
        self._lengths = array("i")
        self._writer = atomic_writer(bin_path(prefix))

    def __enter__(self) -> IndexedWriter:
        self._bin = self._writer.__enter__()
        return self

    def add(self, tokens: Iterable[int]) -> int:
        """Append one document; returns its length in tokens."""
        ids = np.asarray(tokens, dtype=self.dtype)
        self._bin.write(ids.tobytes())
        self._lengths.append(len(ids))
        return len(ids)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None:
            write_idx(self.prefix, self.dtype, np.frombuffer(self._lengths, np.int32))


class IndexedCorpus:
    """Memory-mapped reading of one PREFIX.bin/.idx as a stream of tokens with document bounds.

    Every count and pointer is checked against the sizes of the files when it is opened; a truncated or made-up file
    is an InputError, never a read outside it.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = self._map(idx_path(prefix), np.uint8)
        if index.size < _HEADER.size:
            raise self._broken("ends within its header")
        magic, version, code, sequences, documents = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC:
            raise self._broken("does not begin with MMIDIDX and so is not a Megatron index")
        if version != _VERSION:
            raise self._broken(f"has version {version}; only version {_VERSION} is known")
        if code not in _DTYPES:
            raise self._broken(f"has dtype code {code}, which is not an integer type ({sorted(_DTYPES)})")
        expected = _HEADER.size + sequences * 12 + documents * 8
        if expected != index.size:
            raise self._broken(
                f"announces {sequences} sequences and {documents} document entries, {expected} bytes, "
                f"but has {index.size}"
            )
        self.dtype = np.dtype(_DTYPES[code])
        self._lengths = self._view(index, "<i4", _HEADER.size, sequences)
        self._pointers = self._view(index, "<i8", _HEADER.size + sequences * 4, sequences)
        self._documents = self._view(index, "<i8", _HEADER.size + sequences * 12, documents)
        self._bin_bytes = self._size(bin_path(prefix))
        self._check_contents(sequences)
        self.token_count = self._bin_bytes // self.dtype.itemsize
        self._tokens: npt.NDArray[Any] = (
            self._map(bin_path(prefix), self.dtype) if self.token_count else np.empty(0, self.dtype)
        )

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Lengths [sequences] in tokens, int32."""
        return self._lengths

    @property
    def document_count(self) -> int:
        return len(self._documents) - 1

    def tokens(self, start: int, stop: int) -> Tokens:
        """Token ids [stop - start], int64, from position `start` of the stream."""
        if not 0 <= start <= stop <= self.token_count:
            raise IndexError(f"tokens {start}:{stop} of {self.token_count}")
        return self._tokens[start:stop].astype(np.int64)

    def document_start(self, document: int) -> int:
        """Stream position of the first token of a document; of the end for `document_count`."""
        sequence = int(self._documents[document])
        if sequence == len(self._pointers):
            return self.token_count
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_at(self, position: int) -> int:
        """The document that holds the token at a stream position."""
        if not 0 <= position < self.token_count:
            raise IndexError(f"token {position} of {self.token_count}")
        sequence = int(np.searchsorted(self._pointers, position * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self._documents, sequence, side="right")) - 1

    def foreign_token(self, vocab_size: int) -> int | None:
        """A token id outside 0..vocab_size-1, or None; reads the whole corpus, block by block."""
        for start in range(0, self.token_count, _CHECK_ROWS):
            found = foreign_token(self._tokens[start : start + _CHECK_ROWS], vocab_size)
            if found is not None:
                return found
        return None

    def _check_contents(self, sequences: int) -> None:
        if len(self._documents) == 0 or self._documents[0] != 0 or self._documents[-1] != sequences:
            raise self._broken("has document entries that do not run from 0 to the number of sequences")
        for start in range(0, len(self._documents), _CHECK_ROWS):
            if np.any(np.diff(self._documents[start : start + _CHECK_ROWS + 1]) < 0):
                raise self._broken("has document entries that do not rise")
        position = 0
        for start in range(0, sequences, _CHECK_ROWS):
            lengths = self._lengths[start : start + _CHECK_ROWS].astype(np.int64)
            ends = position + np.cumsum(lengths) * self.dtype.itemsize
            pointers = self._pointers[start : start + _CHECK_ROWS]
            if np.any(lengths < 0) or pointers[0] != position or np.any(pointers[1:] != ends[:-1]):
                raise self._broken("has sequences that do not follow one another without gaps")
            position = int(ends[-1])
        if position != self._bin_bytes:
            raise self._broken(f"describes {position} bytes of tokens, but the .bin file has {self._bin_bytes}")

    def _view(self, index: npt.NDArray[np.uint8], dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        return np.frombuffer(index, dtype=dtype, offset=offset, count=count) if count else np.empty(0, dtype)

    def _map(self, path: Path, dtype: Any) -> npt.NDArray[Any]:
        if self._size(path) == 0:
            raise self._broken("is empty", path)
        return np.memmap(path, dtype=dtype, mode="r")

    def _size(self, path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError as error:
            raise self._broken(f"cannot be read ({error.strerror})", path) from None

    def _broken(self, what: str, path: Path | None = None) -> InputError:
        return InputError(
            f"{what}.", where=path or idx_path(self.prefix), do="Give the prefix of a whole Megatron .bin/.idx pair."
        )
