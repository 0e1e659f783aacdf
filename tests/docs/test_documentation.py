"""The pages agree with each other, with the program and with the recipe's schema."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from documentation import READMES, ROOT, all_pages, anchors, blocks, links, pages, prose
from pydantic import BaseModel

from anychip.cli import app
from anychip.errors import InputError
from anychip.recipe import Recipe, load_recipe

PAGES = all_pages()
PAIRS = list(zip(pages("en"), pages("zh"), strict=True))
PAIR_NAMES = [english.name for english, _ in PAIRS]
COMMANDS = list(dict.fromkeys(tuple(words) for page in PAGES for block in blocks(page) for words in block.commands))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("language", READMES)
def test_the_readme_leads_to_every_page(language: str) -> None:
    assert set(pages(language)[1:]) == set((ROOT / "docs" / language).glob("*.md"))


def test_both_languages_have_the_same_pages_in_the_same_order() -> None:
    english, chinese = ([page.name for page in pages(language)[1:]] for language in ("en", "zh"))
    assert english == chinese and english


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=PAIR_NAMES)
def test_both_languages_have_the_same_commands_and_links(english: Path, chinese: Path) -> None:
    assert blocks(english) == blocks(chinese)
    if english not in READMES.values():
        assert [link.split("#")[0] for link in links(english)] == [link.split("#")[0] for link in links(chinese)]


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=PAIR_NAMES)
def test_both_languages_name_the_same_things(english: Path, chinese: Path) -> None:
    """Fields, files, messages and figures in `code` type, and the shape of the page."""
    assert spans(english) == spans(chinese)
    for mark in ("\n#", "\n|", "\n- "):
        assert prose(english).count(mark) == prose(chinese).count(mark), mark


def spans(page: Path) -> set[str]:
    return set(re.findall(r"`([^`]+)`", prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_in_commands_and_prose_exist(page: Path) -> None:
    text = prose(page) + "".join(block.text for block in blocks(page))
    for path in re.findall(r"(?:^|[\s`])((?:\./|recipes/|benchmarks/|anychip/|tests/)[\w./-]*\w)", text, re.MULTILINE):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_documented_command_is_understood(words: tuple[str, ...]) -> None:
    """Its verb, options and the types of their values; and its recipe, with its overrides."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    if rest == ["--help"]:
        return
    while hasattr(command, "commands"):
        if rest[0] not in command.commands and hasattr(command, "default"):
            rest.insert(0, command.default)
        assert rest[0] in command.commands, rest[0]
        command = command.commands[rest.pop(0)]
    values = command.make_context(" ".join(words), rest).params  # raises for options that do not exist
    if "recipe" in values:
        load_recipe(ROOT / values["recipe"], values["overrides"] or [])


def test_an_invented_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="--stepp"):
        test_a_documented_command_is_understood(("data", "ledger", "runs/demo", "--stepp", "3"))
    with pytest.raises(InputError, match="did you mean steps"):
        test_a_documented_command_is_understood(("train", "recipes/demo.yaml", "--set", "training.stepp=3"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fields_in_the_prose_exist(page: Path) -> None:
    for path in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]+)?`", prose(page)):
        if path.split(".")[0] in Recipe.model_fields and not path.endswith((".json", ".yaml", ".sig")):
            assert is_field(path), path


def is_field(path: str) -> bool:
    model: type[BaseModel] | None = Recipe
    for key in path.split("."):
        if model is None or key not in model.model_fields:
            return False
        model = next(reference().sections_in(model.model_fields[key].annotation), None)
    return True


def reference() -> ModuleType:
    """docs/reference.py, which is a script and in no package."""
    if str(ROOT / "docs") not in sys.path:
        sys.path.insert(0, str(ROOT / "docs"))
    return importlib.import_module("reference")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=5", "training.step is not a field of a recipe; did you mean steps?"),
        ("optimizer.name=sgd", "optimizer.name is 'sgd'; allowed: 'adamw' or 'muon'."),
        ("model.num_attention_heads=5", "hidden_size 128 is not a multiple of num_attention_heads 5."),
    ],
)
def test_the_errors_page_quotes_what_is_said(override: str, message: str) -> None:
    assert message in spans(ROOT / "docs" / "en" / "errors.md")
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(ROOT / "recipes" / "demo.yaml", [override])


@pytest.mark.parametrize("language", READMES)
def test_the_table_of_fields_is_the_schema(language: str) -> None:
    written = (ROOT / "docs" / language / "recipe-fields.md").read_text(encoding="utf-8")
    assert written == reference().page(language), "run `python docs/reference.py`"


def test_no_explanation_is_left_of_a_field_that_is_gone() -> None:
    meanings = sys.modules[reference().meaning.__module__]
    paths = re.findall(r"^(?:\| `|## )([\w.]+(?:\[\][\w.]+)?)", reference().page("en"), re.MULTILINE)
    for table in (meanings.ENGLISH, meanings.CHINESE):
        used = {key for key in table for path in paths if path == key or path.endswith(f".{key}")}
        assert set(table) == used


def test_options_of_benchmarks_exist() -> None:
    for page in PAGES:
        for script, rest in re.findall(r"(benchmarks/\w+\.py)(.*)", "".join(block.text for block in blocks(page))):
            for option in re.findall(r"--[a-z-]+", rest):
                assert f'"{option}"' in (ROOT / script).read_text(encoding="utf-8"), option
