"""Dialogs to tune on: from a file of messages or from documentation strings, and what is held out of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, Literal, get_args

from anychip.errors import InputError

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {**{role: role for role in get_args(Role)}, "bot": "assistant"}
_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_SUBJECTS_HELD_OUT = 0.05
_PHRASINGS_HELD_OUT = 0.05
_FEWEST_SUBJECTS = 100


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Dialog:
    """An optional system message, then user and assistant in turn, the assistant last.

    Dialogs about one thing share a `subject`: held-out subjects are kept out of training with all their phrasings.
    """

    messages: tuple[Message, ...]
    subject: str

    @property
    def question(self) -> str:
        """The last question."""
        return self.messages[-2].content

    @property
    def answer(self) -> str:
        """The answer to it."""
        return self.messages[-1].content


@dataclass(frozen=True)
class DialogSplit:
    """Training dialogs; dialogs whose subject is trained in other words; dialogs whose subject is never trained."""

    training: list[Dialog]
    held_out_phrasings: list[Dialog]
    held_out_subjects: list[Dialog]


def read_dialogs(path: Path) -> list[Dialog]:
    """Every line of a .jsonl file of messages; roles system, user and assistant (or TeleChat's `bot`).

    Raises InputError naming the file and line for anything that is not a dialog to learn from.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror}).", where=path, do="tune.sft.dataset names a .jsonl of messages."
        ) from None
    except UnicodeDecodeError:
        raise InputError("is not text in UTF-8.", where=path, do=f"Each line looks like {_EXAMPLE}") from None
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    dialogs = [_parse_dialog(line, f"{path}, line {number}") for number, line in lines]
    if not dialogs:
        raise InputError("holds no dialogs.", where=path, do=f"Each line looks like {_EXAMPLE}")
    return dialogs


def question_and_answer(question: str, answer: str, subject: str) -> Dialog:
    """A dialog of one turn."""
    return Dialog((Message("user", question), Message("assistant", answer)), subject)


def split_dialogs(dialogs: Iterable[Dialog]) -> DialogSplit:
    """Hold out 5 % of the subjects, and of the other subjects 5 % of the dialogs that are not a subject's only one.

    What is held out follows from subject and question alone, so it does not depend on the order of the corpus. Of fewer
    than 100 subjects nothing is held out: every one of them is needed.
    """
    by_subject: dict[str, list[Dialog]] = {}
    for dialog in dialogs:
        by_subject.setdefault(dialog.subject, []).append(dialog)
    split = DialogSplit([], [], [])
    if len(by_subject) < _FEWEST_SUBJECTS:
        return DialogSplit([dialog for group in by_subject.values() for dialog in group], [], [])
    for subject, group in by_subject.items():
        if _share(subject) < _SUBJECTS_HELD_OUT:
            split.held_out_subjects.extend(group)
            continue
        shares = [_share(subject, dialog.question) for dialog in group]
        kept = [share >= _PHRASINGS_HELD_OUT or share == max(shares) for share in shares]
        split.training.extend(compress(group, kept))
        split.held_out_phrasings.extend(compress(group, (not keep for keep in kept)))
    return split


def _share(*parts: str) -> float:
    """A number in [0, 1) that is always the same for the same text."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _parse_dialog(line: str, where: str) -> Dialog:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("is not valid JSON.", where=where, do=f"Each line looks like {_EXAMPLE}") from None
    turns = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        raise InputError("has no list `messages`.", where=where, do=f"Each line looks like {_EXAMPLE}")
    messages = tuple(_parse_message(turn, number, where) for number, turn in enumerate(turns, start=1))
    _check_turns(messages, where)
    return Dialog(messages, subject=messages[-2].content)


def _parse_message(turn: Any, number: int, where: str) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(
            f"message {number} has the role {role!r}.", where=where, do=f"Known roles: {', '.join(_ROLES)}."
        )
    if not isinstance(content, str) or not content.strip():
        raise InputError(f"message {number} has no text in `content`.", where=where, do="Give it text, or drop it.")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise InputError(f"message {number} holds half of a UTF-16 pair.", where=where, do="Write it in UTF-8.")
    return Message(_ROLES[role], content)


def _check_turns(messages: Sequence[Message], where: str) -> None:
    """system? (user assistant)+"""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    expected: list[Role] = ["user", "assistant"] * ((len(turns) + 1) // 2)
    found = [message.role for message in turns]
    if not found or found != expected:
        raise InputError(
            f"has the roles {', '.join(found) or 'none'} where user and assistant should alternate.",
            where=where,
            do="A dialog is an optional system message, then user and assistant in turn, the assistant last.",
        )
