"""One shard file: plain bytes of tensors behind a safetensors header, hashed on the way out and read back.

Layout: 8 bytes little-endian header length, JSON header padded with spaces, then the tensors without gaps
(https://github.com/huggingface/safetensors). Digests are SHA-256, the fastest in hashlib on CPUs with SHA extensions.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anychip import alive
from anychip.errors import UnfitError
from anychip.train.checkpoint.manifest import Chunk, FileEntry
from anychip.train.checkpoint.plan import Box
from anychip.train.checkpoint.worker import Worker

Bytes = NDArray[np.uint8]

_WRITE_BYTES = 8 << 20
_READ_BYTES = 4 << 20
_WINDOW_BYTES = 64 << 20
_WINDOWS_BEHIND = 2
_HEADER_ALIGNMENT = 8


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a copy only when it is elsewhere or not contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def header_bytes(boxes: list[Box]) -> int:
    """Room that the header of a file with these tensors needs."""
    digits = len(str(sum(box.nbytes for box in boxes)))
    entries = sum(len(json.dumps(box.key)) + len(_header_entry(box, 0, 0)) + 2 * digits for box in boxes)
    return _aligned(8 + 2 + entries + 2 * len(boxes))


class ShardWriter:
    """Writes tensors one after the other into `directory/name`.

    Three things run side by side, a window of data each: writing, flushing, and reading back. What the disk returns is
    compared with the tensor and hashed, so that a digest is always one of bytes that are on the disk. Without
    `read_back` the tensor is hashed, and who opens the file finds what the disk did to it: for data that can be made
    again. Memory: three windows. Raises OSError when the disk does, UnfitError when it returns other bytes than were
    written.
    """

    def __init__(self, directory: Path, name: str, header_room: int, *, read_back: bool = True) -> None:
        self.path, self._name, self._header_room = directory / name, name, header_room
        self._returned = self._read_back if read_back else _as_written
        self.chunks: list[tuple[Box, Chunk]] = []
        self._header: dict[str, object] = {}
        self._header_used = 8 + 2
        self._end = header_room
        self._window: list[_Written] = []
        self._verifications: deque[Future[list[tuple[Box, Chunk]]]] = deque()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self.path, flags, 0o644)
        os.lseek(self._descriptor, header_room, os.SEEK_SET)
        self._flusher = Worker("checkpoint-flush")
        self._verifiers = deque(Worker("checkpoint-verify") for _ in range(_WINDOWS_BEHIND))  # whose turn is next first

    def has_room(self, box: Box) -> bool:
        """Whether the header can still name this tensor."""
        text = json.dumps(box.key) + _header_entry(box, self._end, self._end + box.nbytes)
        return self._header_used + len(text) + 2 <= self._header_room

    def add(self, box: Box, tensor: Tensor) -> None:
        """Append the data of a box; `tensor` has its sizes and dtype and must not change until `finish`."""
        self.add_rows(box, (tensor,))

    def add_rows(self, box: Box, tensors: Iterable[Tensor]) -> None:
        """As `add`, the rows of a box in several tensors. Each is written before the next is asked for."""
        start, parts = self._end, list[memoryview]()
        for tensor in tensors:
            data = byte_view(tensor)
            position = 0
            while position < len(data):
                position += os.write(self._descriptor, data[position : position + _WRITE_BYTES])
                alive.progressed()
            self._end += len(data)
            parts.append(data)
        entry = _header_entry(box, start - self._header_room, self._end - self._header_room)
        self._header[box.key] = json.loads(entry)
        self._header_used += len(json.dumps(box.key)) + len(entry) + 2
        self._window.append(_Written(box, start, parts))
        if sum(written.nbytes for written in self._window) >= _WINDOW_BYTES:
            self._end_window()

    def finish(self) -> FileEntry:
        """Write the header, wait until all is flushed and read back, and check the size; `chunks` is then complete."""
        text = json.dumps(self._header, separators=(",", ":")).encode()
        header = (self._header_room - 8).to_bytes(8, "little") + text.ljust(self._header_room - 8)
        if len(header) != self._header_room:
            raise ValueError(f"the header of {self._name} needs {8 + len(text)} bytes of {self._header_room}")
        if os.pwrite(self._descriptor, header, 0) != len(header):
            raise OSError(f"short write of the header of {self.path}")
        self._end_window()
        while self._verifications:
            self.chunks += self._verifications.popleft().result()
        digest = hashlib.sha256(header).hexdigest()
        entry = FileEntry(nbytes=self._end, header_nbytes=self._header_room, header_sha256=digest)
        with ShardReader(self.path.parent) as reader:
            reader.check_file(self._name, entry)
        return entry

    def close(self) -> None:
        """Release threads and the file; also after a failure."""
        if self._descriptor >= 0:
            self._flusher.close()
            for verifier in self._verifiers:
                verifier.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_window(self) -> None:
        if len(self._verifications) >= _WINDOWS_BEHIND:
            self.chunks += self._verifications.popleft().result()
        window, self._window = self._window, []
        flushed = self._flusher.submit(os.fdatasync, self._descriptor)
        self._verifications.append(self._verifiers[0].submit(self._verify, flushed, window))
        self._verifiers.rotate(-1)

    def _verify(self, flushed: Future[None], window: list[_Written]) -> list[tuple[Box, Chunk]]:
        """Drop the flushed pages from memory, so that whoever reads them next reads the disk, and hash the boxes."""
        flushed.result()
        if window:
            length = window[-1].start + window[-1].nbytes - window[0].start
            os.posix_fadvise(self._descriptor, window[0].start, length, os.POSIX_FADV_DONTNEED)
        return [(written.box, self._chunk(written)) for written in window]

    def _chunk(self, written: _Written) -> Chunk:
        digest, box = hashlib.sha256(), written.box
        for block in self._returned(written):
            digest.update(block)
        return Chunk(
            offsets=list(box.offsets),
            sizes=list(box.sizes),
            file=self._name,
            start=written.start,
            nbytes=written.nbytes,
            sha256=digest.hexdigest(),
        )

    def _read_back(self, written: _Written) -> Iterator[memoryview]:
        """What the disk returns of a box, compared with it."""
        position = written.start
        for data in written.parts:
            source, done = np.frombuffer(data, np.uint8), 0
            for block in _blocks(self._descriptor, position, len(source), self.path):
                if not _same(block, source[done : done + len(block)]):
                    what = f"the disk returns other bytes than were written from {position + done} on."
                    raise UnfitError(what, where=self.path, do="Check the disk.")
                yield block.data
                done += len(block)
            position += done


@dataclass(frozen=True)
class _Written:
    """A box on its way to the disk: where it starts in the file, and its bytes."""

    box: Box
    start: int
    parts: list[memoryview]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))


def _as_written(written: _Written) -> Iterator[memoryview]:
    return iter(written.parts)


@dataclass
class _OpenFile:
    descriptor: int
    nbytes: int


class ShardReader:
    """Reads chunks of the shard files in one directory; every byte is checked against its digest before use.

    Raises UnfitError naming the file and what is wrong with it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, _OpenFile] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """The chunk's elements, in a buffer that the next call reuses."""
        if self._buffer.numel() < chunk.nbytes:
            self._buffer = torch.empty(chunk.nbytes, dtype=torch.uint8)
        flat = self._buffer[: chunk.nbytes]
        descriptor, path = self._file(chunk.file).descriptor, self._directory / chunk.file
        _check_digest(_blocks(descriptor, chunk.start, chunk.nbytes, path, into=flat.numpy()), chunk, path)
        return flat.view(dtype).view(chunk.sizes)

    def check_chunk(self, chunk: Chunk) -> None:
        """Compare a chunk with its digest without keeping it."""
        descriptor, path = self._file(chunk.file).descriptor, self._directory / chunk.file
        _check_digest(_blocks(descriptor, chunk.start, chunk.nbytes, path), chunk, path)

    def check_file(self, name: str, entry: FileEntry) -> None:
        """Check a file's kind, size and header."""
        path, file = self._directory / name, self._file(name)
        if file.nbytes != entry.nbytes:
            raise _damage(path, f"has {file.nbytes} bytes instead of {entry.nbytes}")
        header = Chunk(offsets=[], sizes=[], file=name, start=0, nbytes=entry.header_nbytes, sha256=entry.header_sha256)
        self.check_chunk(header)

    def close(self) -> None:
        for file in self._open.values():
            os.close(file.descriptor)
        self._open.clear()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, name: str) -> _OpenFile:
        if name not in self._open:
            path = self._directory / name
            try:
                # Not through links, and never waiting for a pipe's other end.
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError as error:
                raise _damage(path, "is missing") from error
            except OSError as error:
                raise _damage(path, f"cannot be opened ({error.strerror})") from error
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                os.close(descriptor)
                raise _damage(path, "is not a regular file")
            self._open[name] = _OpenFile(descriptor, status.st_size)
        return self._open[name]


def _blocks(descriptor: int, start: int, nbytes: int, path: Path, into: Bytes | None = None) -> Iterator[Bytes]:
    """Read `nbytes` from `start` block by block, into one buffer that is used again or all of them into `into`."""
    buffer = np.empty(min(_READ_BYTES, nbytes), np.uint8)
    position = 0
    while position < nbytes:
        size = min(_READ_BYTES, nbytes - position)
        block = buffer[:size] if into is None else into[position : position + size]
        try:
            count = os.preadv(descriptor, [block.data], start + position)
        except OSError as error:
            raise _damage(path, f"cannot be read ({error.strerror})") from error
        if count == 0:
            raise _damage(path, f"ends at byte {start + position} inside a tensor")
        yield block[:count]
        position += count
        alive.progressed()


def _same(one: Bytes, other: Bytes) -> bool:
    """Whether as many bytes are equal: by words, several times as fast as byte by byte."""
    words = len(one) // 8 * 8
    return np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64)) and np.array_equal(
        one[words:], other[words:]
    )


def _check_digest(blocks: Iterator[Bytes], chunk: Chunk, path: Path) -> None:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block.data)
    if digest.hexdigest() != chunk.sha256:
        raise _damage(path, f"has wrong bytes between {chunk.start} and {chunk.start + chunk.nbytes}")


def _damage(path: Path, what: str) -> UnfitError:
    return UnfitError(f"{what}.", where=path, do="This checkpoint is damaged; use another one.")


def _header_entry(box: Box, start: int, end: int) -> str:
    return json.dumps(
        {"dtype": box.dtype, "shape": list(box.sizes), "data_offsets": [start, end]}, separators=(",", ":")
    )


def _aligned(size: int) -> int:
    return -(-size // _HEADER_ALIGNMENT) * _HEADER_ALIGNMENT
