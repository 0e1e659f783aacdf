"""Pinned things by their digest: RUN/attest/objects/SHA256.json, each in canonical form, never changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anychip.attest.check.findings import canonical, sha256
from anychip.files import atomic_writer


def keep(folder: Path, value: Any) -> str:
    """Write a JSON value once; returns the digest that stands for it."""
    data = canonical(value)
    digest = sha256(data)
    path = folder / f"{digest}.json"
    if not path.is_file():
        with atomic_writer(path) as handle:
            handle.write(data)
    return digest
