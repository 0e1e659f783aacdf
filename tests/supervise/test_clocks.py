"""A wall clock jumps: nothing that supervises or trains decides by it. It may be read for people, as text at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import anychip

ROOMS = ("supervise", "train", "launch")
WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.utcnow", "datetime.today", "date.today"}


def wall_clock(source: str) -> Iterator[str]:
    """Where a program reads the wall clock for anything but a text."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (f"{node.lineno}: {name.name}" for name in node.names if f"time.{name.name}" in WALL)
        if not isinstance(node, ast.Attribute):
            continue
        name = ast.unparse(node)
        last = ".".join(name.split(".")[-2:])
        call = parents[node]
        shown = isinstance(parents.get(call), ast.Attribute) and parents[call].attr in ("isoformat", "strftime")  # type: ignore[attr-defined]
        if last in WALL or (last == "datetime.now" and not shown):
            yield f"{node.lineno}: {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_decision_is_made_by_the_wall_clock(room: str) -> None:
    paths = sorted((Path(anychip.__file__).parent / room).rglob("*.py"))
    assert paths
    found = [f"{path}:{where}" for path in paths for where in wall_clock(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("import time\nlate = time.time() > deadline", True),
        ("from time import time\nlate = time() > deadline", True),
        ("import datetime\nlate = datetime.datetime.now() > deadline", True),
        ("from datetime import datetime\nlease = datetime.now().timestamp()", True),
        ("from datetime import datetime\nsaid = datetime.now().isoformat()", False),
        ("import time\nlate = time.monotonic() > deadline", False),
    ],
)
def test_the_scan_sees_it(source: str, reads: bool) -> None:
    assert bool(list(wall_clock(source))) == reads
