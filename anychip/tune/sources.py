"""The dialogs that a recipe's sources name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anychip.data.docstrings import documentation_pairs
from anychip.errors import InputError
from anychip.families.messages import Message
from anychip.recipe.schema import DialogSource, SftConfig
from anychip.tune.dialogs import Dialog, question_and_answer
from anychip.tune.puzzles import PUZZLES
from anychip.tune.read import read_dialogs

DOCSTRINGS = "python:docstrings"


def load_dialogs(config: SftConfig) -> list[Dialog]:
    """The dialogs of all sources about the wanted subjects, in a fixed order, under the recipe's system prompt."""
    dialogs = [
        replace(with_system_prompt(dialog, config.system_prompt), source=number)
        for number, source in enumerate(config.sources)
        for dialog in _read(source)
        if not config.subjects or _is_about(dialog, config.subjects)
    ]
    if not dialogs:
        raise InputError(
            f"there is no dialog about {', '.join(config.subjects)}.",
            where=", ".join(source.path for source in config.sources),
            do="Name modules, classes or functions of the dialogs in tune.sft.subjects, or leave it empty.",
        )
    return dialogs


def with_system_prompt(dialog: Dialog, system_prompt: str) -> Dialog:
    """The dialog under the recipe's system prompt, unless it brings its own."""
    if not system_prompt or dialog.messages[0].role == "system":
        return dialog
    return replace(dialog, messages=(Message("system", system_prompt), *dialog.messages))


def _read(source: DialogSource) -> list[Dialog]:
    if source.path in PUZZLES:
        return PUZZLES[source.path]()
    if source.path == DOCSTRINGS:
        return [question_and_answer(pair.question, pair.answer, pair.subject) for pair in documentation_pairs()]
    return read_dialogs(Path(source.path).expanduser(), source.format)


def _is_about(dialog: Dialog, subjects: Sequence[str]) -> bool:
    return any(dialog.subject == subject or dialog.subject.startswith(f"{subject}.") for subject in subjects)
