"""Standard streams that carry any text."""

from __future__ import annotations

import io
from typing import TextIO


def use_utf8(*streams: TextIO) -> None:
    """Pipes carry UTF-8 in any locale; a terminal keeps its encoding. What cannot be read or shown becomes a mark."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
