"""What a model has to beat on the same bytes: `xz -9e`, and a 5-gram model over the same tokens."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anychip.data.batch import IGNORE_LABEL
from anychip.evals.kneser_ney import KneserNey
from anychip.progress import progress

XZ_DICTIONARY_BYTES = 64 << 20  # what preset 9 looks back
_PRESET = 9 | lzma.PRESET_EXTREME
_BLOCK_BYTES = 1 << 20
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class XzResult:
    """Compressed sizes, in bits per byte of the held-out text.

    cold: xz sees the held-out text alone. primed: the growth of the archive when the held-out text follows
    `primed_with_bytes` of training text, which is the fairer rival of a model that has read the training text.
    """

    cold: float
    primed: float | None
    primed_with_bytes: int


def xz_bits_per_byte(held_out: bytes, training: bytes = b"") -> XzResult:
    """`xz -9e` on the held-out text alone, and after as much training text as its dictionary reaches.

    Raises ValueError when there is no held-out text.
    """
    if not held_out:
        raise ValueError("no held-out text was given")
    primer = training[: max(XZ_DICTIONARY_BYTES - len(held_out), 0)]
    with progress("xz -9e", total=len(primer) + len(held_out), unit="bytes") as bar, ThreadPoolExecutor(3) as pool:
        # liblzma lets go of the interpreter, so the three archives are made side by side; the longest one is shown
        both = pool.submit(_archive_bytes, [primer, held_out], bar.advance)
        alone = pool.submit(_archive_bytes, [held_out], _unseen)
        before = pool.submit(_archive_bytes, [primer], _unseen)
        scale = 8.0 / len(held_out)
        primed = (both.result() - before.result()) * scale if primer else None
        return XzResult(alone.result() * scale, primed, len(primer))


def ngram_bits(model: KneserNey, input_ids: npt.NDArray[np.integer], labels: npt.NDArray[np.integer]) -> float:
    """Bits the n-gram model needs for the labels [n, seq] that are not -100.

    Contexts are those of the decoder: the tokens before in the same row, and nothing from other rows.
    """
    rows = np.concatenate([input_ids, labels[:, -1:]], axis=1)
    rows = np.where(rows == IGNORE_LABEL, 0, rows)
    bits = 0.0
    with progress(f"{model.order}-gram score", total=len(rows), unit="sequences") as bar:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            surprise = -np.log2(model.probabilities(part)[:, 1:])
            bits += float(surprise[labels[start : start + _ROWS_AT_ONCE] != IGNORE_LABEL].sum())
            bar.advance(len(part))
    return bits


def _archive_bytes(parts: list[bytes], advance: Callable[[float], None]) -> int:
    """Size of the .xz file of all parts one after another; nothing is kept."""
    compressor = lzma.LZMACompressor(preset=_PRESET)
    size = 0
    for part in parts:
        for start in range(0, len(part), _BLOCK_BYTES):
            block = part[start : start + _BLOCK_BYTES]
            size += len(compressor.compress(block))
            advance(len(block))
    return size + len(compressor.flush())


def _unseen(_: float) -> None:
    """Progress that nobody looks at."""
