"""The documentation as tests read it: pages, their command blocks, links and headings.

A fence ```bash holds commands to read, ```bash run holds commands that a test runs too, in the order in which the
README links to the pages.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh.md"}

_FENCE = re.compile(r"^```(\w*) ?(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PROGRAM = ".venv/bin/anychip"


@dataclass(frozen=True)
class Block:
    """One bash fence; `runs` when it is marked ```bash run."""

    text: str
    runs: bool

    @property
    def commands(self) -> list[list[str]]:
        """The words of each `anychip` command in it, without the program's name."""
        found = []
        for line in self.text.splitlines():
            words = shlex.split(line, comments=True)
            if _PROGRAM in words:
                found.append(words[words.index(_PROGRAM) + 1 :])
            elif "anychip" in words and words[words.index("anychip") - 1] == "-m":
                found.append(words[words.index("anychip") + 1 :])
        return [words[: words.index(">")] if ">" in words else words for words in found]


def pages(language: str) -> list[Path]:
    """The README, then its pages in the order of its first links to them."""
    readme = READMES[language]
    linked = dict.fromkeys(target.split("#")[0] for target in links(readme))
    prefix = f"docs/{language}/"
    return [readme, *(ROOT / target for target in linked if target.startswith(prefix) and target.endswith(".md"))]


def all_pages() -> list[Path]:
    return [page for language in READMES for page in pages(language)]


def blocks(page: Path) -> list[Block]:
    """The bash fences of a page."""
    fences = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(text, mark == "run") for kind, mark, text in fences if kind == "bash"]


def prose(page: Path) -> str:
    """The page without its fences."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Relative links, with their anchors."""
    return [target for target in _LINK.findall(prose(page)) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may name, by GitHub's rule."""
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose(page)))
    return {heading.strip().replace(" ", "-") for heading in headings}
