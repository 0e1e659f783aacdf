"""Train or validation: decided by the document's own text, so the same text is always on the same side."""

from __future__ import annotations

import hashlib
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
    if not moved.is_file():
        if validation.is_dir():
            return
        files = sorted(train.glob("*.jsonl"))
        lines = [(draw(orjson.loads(line)["text"]), line) for path in files for line in path.open("rb")]
        if len(lines) < 2:
            return
        with atomic_writer(moved) as handle:
            handle.write(min(lines)[1])
    line_moved = moved.read_bytes()
    for path in sorted(train.glob("*.jsonl")):
        lines_left = path.read_bytes().splitlines(keepends=True)
        if line_moved in lines_left:
            with atomic_writer(path) as handle:
                handle.writelines(line for line in lines_left if line != line_moved)
