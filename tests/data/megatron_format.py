"""A second reader and writer of Megatron's .bin/.idx, from the description of the format alone."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np

CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def write(prefix: Path, documents: list[list[list[int]]], code: int) -> None:
    """Documents of sequences of token ids."""
    sequences = [np.array(sequence, CODES[code]) for document in documents for sequence in document]
    Path(f"{prefix}.bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    pointers = [0]
    for sequence in sequences:
        pointers.append(pointers[-1] + sequence.nbytes)
    entries = [0]
    for document in documents:
        entries.append(entries[-1] + len(document))
    with Path(f"{prefix}.idx").open("wb") as handle:
        handle.write(b"MMIDIDX\x00\x00")
        handle.write(struct.pack("<Q", 1))
        handle.write(struct.pack("<B", code))
        handle.write(struct.pack("<Q", len(sequences)))
        handle.write(struct.pack("<Q", len(entries)))
        handle.write(np.array([len(sequence) for sequence in sequences], np.int32).tobytes())
        handle.write(np.array(pointers[:-1], np.int64).tobytes())
        handle.write(np.array(entries, np.int64).tobytes())


def read(prefix: Path) -> tuple[list[list[list[int]]], int]:
    """Documents of sequences of token ids, and the dtype code."""
    with Path(f"{prefix}.idx").open("rb") as handle:
        assert handle.read(9) == b"MMIDIDX\x00\x00"
        assert struct.unpack("<Q", handle.read(8)) == (1,)
        (code,) = struct.unpack("<B", handle.read(1))
        (sequence_count,) = struct.unpack("<Q", handle.read(8))
        (entry_count,) = struct.unpack("<Q", handle.read(8))
        rest = handle.read()
    lengths = np.frombuffer(rest, np.int32, sequence_count)
    pointers = np.frombuffer(rest, np.int64, sequence_count, lengths.nbytes)
    entries = np.frombuffer(rest, np.int64, entry_count, lengths.nbytes + pointers.nbytes)
    assert len(rest) == lengths.nbytes + pointers.nbytes + entries.nbytes
    data = Path(f"{prefix}.bin").read_bytes()
    sequences = [
        np.frombuffer(data, CODES[code], length, pointer).tolist()
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    return [sequences[a:b] for a, b in pairwise(entries)], code
