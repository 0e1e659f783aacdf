"""docs/*/chips.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anychip.chips.detect import BUILT_IN, load_backend
from anychip.chips.facts import VendorFacts, collective_timeouts

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*/chips.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_table_lists_every_backend_as_it_is(page: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: re.findall(r"[\w-]+", cells) for name, cells in rows} == {
        name: cells_of(load_backend(name).facts) for name in BUILT_IN
    }


def cells_of(facts: VendorFacts) -> list[str]:
    return [
        facts.device_type,
        facts.plug_in.module if facts.plug_in else "-",
        facts.collectives.backend,
        facts.visible_devices or "-",
        facts.tools[0] if facts.tools else "-",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_table_of_timeouts_is_the_rule(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for world_size in (1, 8, 512, 8192, 100_000):
        seconds = collective_timeouts(world_size)
        assert "| 300 + 60 × (N / 512) |" in text and seconds.connect == 300 + 60 * (world_size // 512)
        assert f"| {seconds.execute} |" in text and f"| {seconds.event} |" in text
        assert seconds.group == max(seconds.connect, seconds.execute, seconds.event) + 120
        assert re.search(r"\b120\b", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_example_is_a_backend(page: Path) -> None:
    example = re.search(r"```python\n(.+?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    exec(example.group(1), names)
    backend = names["ToyBackend"]()  # type: ignore[operator]
    assert backend.vendor == "toy" and [s.name for s in backend.environment(8)] == ["TOY_QUEUE"]
