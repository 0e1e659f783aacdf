"""Dialogs to tune on, what they must look like, and what is held out of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

from anychip.errors import InputError
from anychip.families.messages import Message, Role

_SUBJECTS_HELD_OUT = 0.05
_PHRASINGS_HELD_OUT = 0.05
_FEWEST_SUBJECTS = 100
_MAY_FOLLOW: dict[Role | None, tuple[Role, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True)
class Dialog:
    """An optional system message, then questions and answers in turn, an answer last. An answer that calls tools is
    followed by their results and another answer. `tools` are the JSON schemas of the tools offered; `source` is the
    number of the recipe's source that it is of.

    Dialogs about one thing share a `subject`: held-out subjects are kept out of training with all their phrasings.
    """

    messages: tuple[Message, ...]
    subject: str
    tools: tuple[str, ...] = ()
    source: int = 0

    @property
    def question(self) -> str:
        """The last question."""
        return last_question(self.messages)

    @property
    def answer(self) -> str:
        """The answer that ends the dialog."""
        return self.messages[-1].content


@dataclass(frozen=True)
class DialogSplit:
    """Training dialogs; dialogs whose subject is trained in other words; dialogs whose subject is never trained."""

    training: list[Dialog]
    held_out_phrasings: list[Dialog]
    held_out_subjects: list[Dialog]


def last_question(messages: Sequence[Message]) -> str:
    return next((message.content for message in reversed(messages) if message.role == "user"), "")


def question_and_answer(question: str, answer: str, subject: str) -> Dialog:
    """A dialog of one turn."""
    return Dialog((Message("user", question), Message("assistant", answer)), subject)


def check_turns(messages: Sequence[Message], where: str, *, complete: bool = True) -> None:
    """system? (user assistant (tool+ assistant)*)+, or with `complete` False all of that before an answer.

    Raises InputError naming the first message that is out of turn, or empty where it must not be.
    """
    start = 1 if messages and messages[0].role == "system" else 0
    before: Role | None = None
    for number, message in enumerate(messages[start:], start=start + 1):
        expected = _MAY_FOLLOW[before]
        asked = before != "assistant" or message.role != "tool" or _calls_tools(messages[number - 2])
        if message.role not in expected or not asked:
            raise InputError(
                f"message {number} is of the role {message.role} where user and assistant should alternate.",
                where=where,
                do="A dialog is an optional system message, then user and assistant in turn; results of tools follow "
                "the answer that calls them.",
            )
        if not message.content.strip() and message.role != "tool" and not message.tool_calls:
            raise InputError(f"message {number} has no text in `content`.", where=where, do="Give it text, or drop it.")
        before = message.role
    if before != "assistant" if complete else before not in ("user", "tool"):
        raise InputError(
            f"ends with the role {before or 'of no message'} where user and assistant should alternate.",
            where=where,
            do="An answer to learn comes last." if complete else "A question, or the result of a tool, comes last.",
        )


def _calls_tools(message: Message) -> bool:
    return bool(message.tool_calls) or message.tagged


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
