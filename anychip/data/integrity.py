"""Packed tokens that are what they were when they were packed: every block is compared with its digest before its first
token is used.

PREFIX.blocks holds the SHA-256 of each 128 KiB of PREFIX.bin (what Linux reads ahead anyway); what `data/summary.json`
says of the corpus holds the digests of PREFIX.blocks, .idx and .documents, and the summary holds its own. A process
verifies what it reads, once, so a start costs little and a corpus of terabytes is never read for its own sake.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anychip.data.indexed import bin_path, idx_path
from anychip.errors import AnychipError, InputError, UnfitError
from anychip.files import atomic_writer, json_text, sha256_file, sha256_json, write_text

BLOCK_BYTES = 128 << 10
_READ_BYTES = 4 << 20
_DIGEST_BYTES = 32
_SEAL = "sha256"
_DO = "Restore it from a copy, or remove it and run `anychip data prepare RECIPE` again."
_FOREIGN_DO = "Restore it from a copy; if it was replaced on purpose, give the recipe another name."


class DamagedBlock(UnfitError):
    """Some tokens of a corpus are not what was packed; the rest of it may be good."""


def blocks_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".blocks")


class BlockHasher:
    """SHA-256 of every BLOCK_BYTES of what passes by, in pieces of any size."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._open, self._filled = hashlib.sha256(), 0

    def update(self, piece: bytes) -> None:
        view = memoryview(piece)
        while view:
            part, view = view[: BLOCK_BYTES - self._filled], view[BLOCK_BYTES - self._filled :]
            self._open.update(part)
            self._filled += len(part)
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def finish(self) -> bytes:
        """All digests, one behind the other."""
        if self._filled:
            self._end_block()
        return b"".join(self._digests)

    def _end_block(self) -> None:
        self._digests.append(self._open.digest())
        self._open, self._filled = hashlib.sha256(), 0


def write_blocks(tokens: Path, blocks: Path) -> str:
    """Write the digests of the blocks of a .bin file; returns the digest of the file written."""
    hasher = BlockHasher()
    with tokens.open("rb") as handle:
        while piece := handle.read(_READ_BYTES):
            hasher.update(piece)
    table = hasher.finish()
    with atomic_writer(blocks) as writer:
        writer.write(table)
    return hashlib.sha256(table).hexdigest()


class VerifiedBlocks:
    """The blocks of one PREFIX.bin; `check` before reading.

    `held` is what the run's summary says of the corpus, `blocks` the file of digests where that is not PREFIX.blocks.
    From an older release it has no digests of blocks: then the whole file is verified now. Raises UnfitError naming the
    file that is not what it was, DamagedBlock for a block of tokens.
    """

    def __init__(self, prefix: Path, held: Mapping[str, Any], blocks: Path | None = None) -> None:
        self._path = bin_path(prefix)
        self._do = _FOREIGN_DO if blocks else _DO
        check_whole(idx_path(prefix), held.get("idx_sha256"), self._do)
        self._digests = np.empty((0, _DIGEST_BYTES), np.uint8)
        self._verified = np.empty(0, bool)
        if "blocks_sha256" not in held:
            check_whole(self._path, held.get("bin_sha256"))
            return
        table = blocks or blocks_path(prefix)
        check_whole(table, held["blocks_sha256"])
        if table.stat().st_size:  # mapped, so that the processes of a host share it
            self._digests = np.memmap(table, np.uint8, mode="r").reshape(-1, _DIGEST_BYTES)
        self._verified = np.zeros(len(self._digests), bool)
        if len(self._verified) != -(-_size(self._path) // BLOCK_BYTES):
            raise UnfitError("does not have the size that it was packed with.", where=self._path, do=self._do)

    def check(self, start: int, stop: int) -> None:
        """Verify the blocks that hold bytes [start, stop), if they are not yet."""
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        if self._verified[first:last].all():
            return
        try:
            with self._path.open("rb") as handle:
                for block in range(first, last):
                    if not self._verified[block]:
                        handle.seek(block * BLOCK_BYTES)
                        found = hashlib.sha256(handle.read(BLOCK_BYTES)).digest()
                        if found != self._digests[block].tobytes():
                            raise self._damaged(block, "has wrong bytes")
                        self._verified[block] = True
        except OSError as error:
            raise self._damaged(first, f"cannot be read ({error.strerror})") from None

    def _damaged(self, block: int, what: str) -> DamagedBlock:
        begin = block * BLOCK_BYTES
        return DamagedBlock(f"{what} between {begin:,} and {begin + BLOCK_BYTES:,}.", where=self._path, do=self._do)


def check_whole(path: Path, expected: object, do: str = _DO) -> None:
    """Raise UnfitError unless the file has this SHA-256, InputError when there is no such file."""
    try:
        found = sha256_file(path)
    except OSError as error:
        raise _unreadable(path, error, do) from None
    if found != expected:
        raise UnfitError("is not the file that was packed: its digest differs.", where=path, do=do)


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object that holds the digest of the rest of itself."""
    write_text(path, _sealed_text(value))


def read_sealed(path: Path, keys: Collection[str]) -> dict[str, Any]:
    """What `write_sealed` wrote; an older release wrote objects of these keys without a digest.

    Raises UnfitError when a byte of it was changed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value: dict[str, Any] = json.loads(text)
        whole = value.keys() == set(keys) or text == _sealed_text({k: v for k, v in value.items() if k != _SEAL})
    except OSError as error:
        raise UnfitError(f"cannot be read ({error.strerror}).", where=path, do=_DO) from None
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise UnfitError("was changed or is damaged: its digest differs.", where=path, do=_DO)
    value.pop(_SEAL, None)
    return value


def _sealed_text(value: Mapping[str, Any]) -> str:
    return json_text({**value, _SEAL: sha256_json(value)})


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error, _DO) from None


def _unreadable(path: Path, error: OSError, do: str) -> AnychipError:
    """A file that is not there was removed by somebody; one that cannot be read is a failing disk's."""
    kind = InputError if isinstance(error, FileNotFoundError) else UnfitError
    return kind(f"cannot be read ({error.strerror}).", where=path, do=do)
