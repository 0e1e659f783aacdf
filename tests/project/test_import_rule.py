"""The house rule: a room imports only rooms that stand before it, and only `chips` knows a vendor."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "anychip"

# Rooms on one level may not import each other, except within BASE.
LEVELS = [
    {"alive", "errors", "files", "progress", "families", "recipe", "rundir", "sandbox"},
    {"chips"},
    {"model"},
    {"data", "parallel", "plan"},
    {"launch"},
    {"train"},
    {"grow", "tune", "evals", "supervise", "verify"},
    {"interchange"},
    {"serve", "attest"},
    {"report"},
    {"stages"},
    {"cli"},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in LEVEL_OF
)


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"anychip.{alias.name}" for alias in node.names] if node.module == "anychip" else [node.module or ""]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "anychip" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_rooms_before_them(path: Path) -> None:
    room = room_of(path)
    for other in imported_rooms(path):
        allowed = other == room or LEVEL_OF[other] < LEVEL_OF[room] or (LEVEL_OF[other] == LEVEL_OF[room] == 0)
        assert allowed, f"{room} may not import {other}"


VENDOR_WORDS = re.compile(r"torch\.(cuda|npu|mlu|musa)\b|['\"](nccl|hccl|cncl|mccl)['\"]|torch_(npu|mlu|musa)")
UNSAFE_LOADING = re.compile(r"\bpickle\.loads?\(|torch\.load\(|yaml\.load\(|allow_pickle=True|trust_remote_code=True")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_vendors_stay_in_chips_and_nothing_is_unpickled(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if room_of(path) != "chips":
        assert not VENDOR_WORDS.search(text)
    assert not UNSAFE_LOADING.search(text)
