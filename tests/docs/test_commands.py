"""What the documentation says can be typed: in both languages alike, known to the program, and run here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import finish, write_tiny_recipe

ROOT = Path(__file__).parents[2]
PAIRS = [(ROOT / "README.md", ROOT / "README.zh.md")]
PAIRS += [(page, ROOT / "docs" / "zh" / page.name) for page in sorted((ROOT / "docs" / "en").glob("*.md"))]
PAGES = [page for pair in PAIRS for page in pair]


def commands(page: Path) -> list[str]:
    """Lines of the page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=[pair[0].name for pair in PAIRS])
def test_both_languages_have_the_same_pages_and_commands(english: Path, chinese: Path) -> None:
    assert commands(english) == commands(chinese)


def test_no_chinese_page_lacks_its_english_one() -> None:
    assert {p.name for p in (ROOT / "docs" / "zh").glob("*.md")} == {
        p.name for p in (ROOT / "docs" / "en").glob("*.md")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_that_a_page_names_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
    for command in commands(page):
        for word in shlex.split(command):
            if word.startswith(("recipes/", "benchmarks/", "./")):
                assert (ROOT / word).exists(), word


def test_the_table_of_fields_is_the_schema() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import reference

    for language in ("en", "zh"):
        assert (ROOT / "docs" / language / "recipe-fields.md").read_text(encoding="utf-8") == reference.page(language)


def documented() -> list[list[str]]:
    """Every distinct anychip command of the documentation, as words behind the program's name."""
    lines = dict.fromkeys(line for page in PAGES for line in commands(page) if "bin/anychip " in line)
    return [shlex.split(line)[1:] for line in lines]


def test_every_documented_command_runs(tmp_path: Path) -> None:
    """In order, on a tiny corpus in the place of the demo's."""
    recipe = tmp_path / "recipes" / "demo.yaml"
    recipe.parent.mkdir()
    write_tiny_recipe(tmp_path, name="demo").rename(recipe)
    pairs = (
        '{"messages": [{"role": "user", "content": "say what"}, {"role": "assistant", "content": "what comes next"}]}'
    )
    (tmp_path / "pairs.jsonl").write_text(pairs + "\n", encoding="utf-8")
    text = recipe.read_text(encoding="utf-8")
    sft = f"dataset: '{tmp_path / 'pairs.jsonl'}', steps: 2, micro_batch_size: 1, global_batch_size: 1"
    tune = f"tune:\n  sft: {{{sft}}}\n"
    recipe.write_text(text.replace("steps: 12", "steps: 4") + tune, encoding="utf-8")
    finish(tmp_path, "run", "recipes/demo.yaml")
    for words in documented():
        if "training.steps=800" in words:
            words = ["training.steps=5" if word == "training.steps=800" else word for word in words]
        if words[0] == "chat":
            answer = subprocess.run(
                [sys.executable, "-m", "anychip", *words, "--max-new-tokens", "4"],
                cwd=tmp_path, input="hello\n", capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert answer.returncode == 0, answer.stderr
        else:
            finish(tmp_path, *words)
