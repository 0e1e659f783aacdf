"""What is left of a file that its writer may have been killed at, or that is not there."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of JSON at the end of a file."""
    rows = []
    for line in tail(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def tail(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return handle.read().decode("utf-8", "replace")
    except OSError:
        return ""


def is_cut(path: Path) -> bool:
    """Whether a file is longer than its `tail`."""
    try:
        return path.stat().st_size > _TAIL_BYTES
    except OSError:
        return False


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def written(path: Path) -> str:
    return datetime.fromtimestamp(modified(path), timezone.utc).isoformat(timespec="seconds")
