"""Questions whose answers can be checked: what a model is asked while rewards teach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anychip.errors import InputError
from anychip.recipe.schema import DialogSource
from anychip.tune.dialogs import Dialog, check_turns, last_question, split_dialogs
from anychip.tune.forms import parse_dialog, parse_messages
from anychip.tune.puzzles import PUZZLES
from anychip.tune.read import read_records
from anychip.tune.sources import with_system_prompt

EXAMPLE = '{"prompt": "What is 2 + 2?", "answer": "4"}'


@dataclass(frozen=True)
class Task:
    """`dialog` ends in the question. `reference` is a good answer ("" where none is known); `tests` is a program that
    ends without an error behind one that is right ("" where there are none)."""

    dialog: Dialog
    reference: str = ""
    tests: str = ""


@dataclass(frozen=True)
class TaskSplit:
    training: list[Task]
    held_out: list[Task]


def load_tasks(sources: Sequence[DialogSource], system_prompt: str) -> list[Task]:
    """The tasks of all sources, in a fixed order, under the recipe's system prompt."""
    return [
        replace(task, dialog=replace(with_system_prompt(task.dialog, system_prompt), source=number))
        for number, source in enumerate(sources)
        for task in _read(source)
    ]


def split_tasks(tasks: Sequence[Task]) -> TaskSplit:
    """The subjects that supervised tuning holds out are held out here too."""
    split = split_dialogs([task.dialog for task in tasks])
    training, held_out = set(split.training), set(split.held_out_subjects)
    return TaskSplit(
        [task for task in tasks if task.dialog in training], [task for task in tasks if task.dialog in held_out]
    )


def _read(source: DialogSource) -> list[Task]:
    if source.path in PUZZLES:
        return [_without_answer(dialog) for dialog in PUZZLES[source.path]()]
    path = Path(source.path).expanduser()
    return read_records(path, lambda record, where: parse_task(record, source.format, where), EXAMPLE)


def parse_task(record: object, form: str, where: str) -> Task:
    """A record with a `prompt` (text or messages) or `messages`, and `answer` or `tests` or both; or a dialog in any
    form, whose last answer then is the one to compare with. Raises InputError for anything else."""
    if not isinstance(record, dict) or not record.keys() & {"prompt", "answer", "tests"}:
        return _without_answer(parse_dialog(record, form, where))
    reference, tests = record.get("answer", ""), record.get("tests", "")
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        reference = str(reference)
    tests = "\n".join(tests) if _is_list_of_text(tests) else tests
    if not isinstance(reference, str) or not isinstance(tests, str) or not (reference or tests):
        raise InputError("has no text in `answer` or `tests`.", where=where, do=f"Each line looks like {EXAMPLE}")
    asked = record.get("prompt", record.get("messages"))
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    messages = parse_messages(turns, where)
    check_turns(messages, where, complete=False)
    return Task(Dialog(tuple(messages), last_question(messages)), reference, tests)


def _without_answer(dialog: Dialog) -> Task:
    return Task(replace(dialog, messages=dialog.messages[:-1]), dialog.answer)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
