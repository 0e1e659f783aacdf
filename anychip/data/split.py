"""Train or validation: decided by the document's own text, so the same text is always on the same side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import orjson

from anychip.files import atomic_writer

Side = Literal["train", "validation"]


def draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=7, person=b"anychip/split").digest()
    return int.from_bytes(digest, "big") / 2**56


def side(text: str, validation_fraction: float) -> Side:
    """Which side of the split a document falls on."""
    return "validation" if draw(text) < validation_fraction else "train"


def hold_one_out(train: Path, validation: Path) -> None:
    """Give a small corpus a validation side: of `train/*.jsonl`, the document with the lowest draw moves over.

    Does nothing when documents are held out already. Continues after an interruption: the document is written to
    its new place before it leaves the old one.
    """
    moved = validation / "moved.jsonl"
    files = sorted(train.glob("*.jsonl"))
    if not moved.is_file():
        if validation.is_dir() or sum(1 for _ in islice(_lines(files), 2)) < 2:
            return
        lowest = min(_lines(files), key=lambda line: draw(orjson.loads(line)["text"]))
        with atomic_writer(moved) as handle:
            handle.write(lowest)
    line_moved = moved.read_bytes()
    for path in files:
        if line_moved in _lines([path]):
            with atomic_writer(path) as handle:
                handle.writelines(line for line in _lines([path]) if line != line_moved)


def _lines(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as handle:
            yield from handle
