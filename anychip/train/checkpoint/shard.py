"""One shard file: plain bytes of tensors behind a safetensors header, hashed on the way out and read back.

Layout: 8 bytes little-endian header length, JSON header padded with spaces, then the tensors without gaps
(https://github.com/huggingface/safetensors). Digests are SHA-256, the fastest in hashlib on CPUs with SHA extensions.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from anychip.errors import UnfitError
from anychip.train.checkpoint.manifest import Chunk, FileEntry
from anychip.train.checkpoint.plan import Box
from anychip.train.checkpoint.worker import Worker

_BLOCK_BYTES = 8 << 20
_READ_BACK_BYTES = 64 << 20
_HASH_IN_THREAD_BYTES = 1 << 16
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
    """Writes tensors one after the other into `directory/name`, in constant memory.

    Hashing runs beside writing, and what has reached the disk is read back and compared beside further writing.
    Raises OSError when the disk does, UnfitError when the disk returns other bytes than were written.
    """

    def __init__(self, directory: Path, name: str, header_room: int) -> None:
        self.path, self._name, self._header_room = directory / name, name, header_room
        self.entries: list[tuple[Box, Chunk]] = []
        self._header: dict[str, object] = {}
        self._header_used = 8 + 2
        self._end = header_room
        self._unverified: list[Chunk] = []
        self._verifications: list[Future[None]] = []
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self.path, flags, 0o644)
        os.lseek(self._descriptor, header_room, os.SEEK_SET)
        self._hasher, self._verifier = Worker("checkpoint-hash"), Worker("checkpoint-verify")

    def has_room(self, box: Box) -> bool:
        """Whether the header can still name this tensor."""
        text = json.dumps(box.key) + _header_entry(box, self._end, self._end + box.nbytes)
        return self._header_used + len(text) + 2 <= self._header_room

    def add(self, box: Box, tensor: Tensor) -> Chunk:
        """Append the data of a box; `tensor` has its sizes and dtype."""
        data = byte_view(tensor)
        digest = self._digest(data)
        self._write(data)
        start, self._end = self._end, self._end + len(data)
        chunk = Chunk(
            offsets=list(box.offsets),
            sizes=list(box.sizes),
            file=self._name,
            start=start,
            nbytes=len(data),
            sha256=digest.result(),
        )
        entry = _header_entry(box, start - self._header_room, self._end - self._header_room)
        self._header[box.key] = json.loads(entry)
        self._header_used += len(json.dumps(box.key)) + len(entry) + 2
        self.entries.append((box, chunk))
        self._unverified.append(chunk)
        if sum(chunk.nbytes for chunk in self._unverified) >= _READ_BACK_BYTES:
            self._read_back()
        return chunk

    def finish(self) -> FileEntry:
        """Write the header, wait until everything is flushed and read back, and check the size."""
        text = json.dumps(self._header, separators=(",", ":")).encode()
        header = (self._header_room - 8).to_bytes(8, "little") + text.ljust(self._header_room - 8)
        if len(header) != self._header_room:
            raise ValueError(f"the header of {self._name} needs {8 + len(text)} bytes of {self._header_room}")
        if os.pwrite(self._descriptor, header, 0) != len(header):
            raise OSError(f"short write of the header of {self.path}")
        self._read_back()
        for verification in self._verifications:
            verification.result()
        entry = FileEntry(
            nbytes=self._end, header_nbytes=self._header_room, header_sha256=hashlib.sha256(header).hexdigest()
        )
        with ShardReader(self.path.parent) as reader:
            reader.check_file(self._name, entry)
        return entry

    def close(self) -> None:
        """Release threads and the file; also after a failure."""
        if self._descriptor >= 0:
            self._verifier.close()
            self._hasher.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _digest(self, data: memoryview) -> Future[str]:
        if len(data) > _HASH_IN_THREAD_BYTES:
            return self._hasher.submit(_sha256, data)
        digest: Future[str] = Future()
        digest.set_result(_sha256(data))
        return digest

    def _write(self, data: memoryview) -> None:
        position = 0
        while position < len(data):
            position += os.write(self._descriptor, data[position : position + _BLOCK_BYTES])

    def _read_back(self) -> None:
        chunks, self._unverified = self._unverified, []
        self._verifications.append(self._verifier.submit(self._verify, chunks))

    def _verify(self, chunks: list[Chunk]) -> None:
        """Flush, drop the flushed pages from memory, and hash what the disk returns."""
        os.fdatasync(self._descriptor)
        if chunks:
            length = chunks[-1].start + chunks[-1].nbytes - chunks[0].start
            os.posix_fadvise(self._descriptor, chunks[0].start, length, os.POSIX_FADV_DONTNEED)
        for chunk in chunks:
            _check_chunk(self._descriptor, chunk, self.path)


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
        self._fill(chunk, flat.numpy().data)
        return flat.view(dtype).view(chunk.sizes)

    def _fill(self, chunk: Chunk, data: memoryview) -> None:
        path, file = self._directory / chunk.file, self._file(chunk.file)
        position = 0
        while position < len(data):
            try:
                count = os.preadv(file.descriptor, [data[position : position + _BLOCK_BYTES]], chunk.start + position)
            except OSError as error:
                raise _damage(path, f"cannot be read ({error.strerror})") from error
            if count == 0:
                raise _damage(path, f"ends at byte {chunk.start + position} inside a tensor")
            position += count
        if _sha256(data) != chunk.sha256:
            raise _damage(path, f"has wrong bytes between {chunk.start} and {chunk.start + chunk.nbytes}")

    def check_chunk(self, chunk: Chunk) -> None:
        """Compare a chunk with its digest without keeping it."""
        _check_chunk(self._file(chunk.file).descriptor, chunk, self._directory / chunk.file)

    def check_file(self, name: str, entry: FileEntry) -> None:
        """Check a file's kind, size and header."""
        path, file = self._directory / name, self._file(name)
        if file.nbytes != entry.nbytes:
            raise _damage(path, f"has {file.nbytes} bytes instead of {entry.nbytes}")
        header = Chunk(offsets=[], sizes=[], file=name, start=0, nbytes=entry.header_nbytes, sha256=entry.header_sha256)
        _check_chunk(file.descriptor, header, path)

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


def _check_chunk(descriptor: int, chunk: Chunk, path: Path) -> None:
    digest, block = hashlib.sha256(), bytearray(min(_BLOCK_BYTES, chunk.nbytes))
    position = 0
    while position < chunk.nbytes:
        view = memoryview(block)[: chunk.nbytes - position]
        try:
            count = os.preadv(descriptor, [view], chunk.start + position)
        except OSError as error:
            raise _damage(path, f"cannot be read ({error.strerror})") from error
        if count == 0:
            raise _damage(path, f"ends at byte {chunk.start + position} inside a tensor")
        digest.update(view[:count])
        position += count
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


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
