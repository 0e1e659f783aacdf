"""Train or validation: decided by the document's own text, so the same text is always on the same side."""

from __future__ import annotations

import hashlib
from typing import Literal

Side = Literal["train", "validation"]


def draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=7, person=b"anychip/split").digest()
    return int.from_bytes(digest, "big") / 2**56


def side(text: str, validation_fraction: float) -> Side:
    """Which side of the split a document falls on."""
    return "validation" if draw(text) < validation_fraction else "train"
