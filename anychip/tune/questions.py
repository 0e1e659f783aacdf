"""Which questions a tuned model is asked, and what the tuning data knows about each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anychip.tune.dialogs import Dialog, DialogSplit

Novelty = Literal["trained", "held_out_phrasing", "held_out_subject", "own"]
_SHORTEST_SUBJECT = 3


@dataclass(frozen=True)
class Question:
    """A question, the answer of the documentation where it is known, and what tuning had seen of it.

    trained: this very question; held_out_phrasing: its subject, asked in other words; held_out_subject: neither;
    own: about no subject of the tuning data.
    """

    question: str
    reference: str
    novelty: Novelty


def choose_questions(own: Sequence[str], split: DialogSplit, extra: int = 2) -> list[Question]:
    """The user's questions, then `extra` of each held-out kind, evenly spread over what is held out."""
    known = _KnownSubjects(split)
    chosen = [known.question(text) for text in own]
    for dialogs, novelty in _by_novelty(split)[1:]:
        stride = max(len(dialogs) // extra, 1) if extra else 1
        chosen += [Question(d.question, d.answer, novelty) for d in dialogs[stride // 2 :: stride][:extra]]
    return chosen


class _KnownSubjects:
    """Finds what the tuning data says about a user's own question."""

    def __init__(self, split: DialogSplit) -> None:
        self._by_question: dict[str, Question] = {}
        self._by_subject: dict[str, Question] = {}
        for dialogs, novelty in _by_novelty(split):
            in_other_words: Novelty = "held_out_phrasing" if novelty == "trained" else novelty
            for dialog in dialogs:
                self._by_question.setdefault(dialog.question, Question(dialog.question, dialog.answer, novelty))
                self._by_subject.setdefault(dialog.subject.lower(), Question("", dialog.answer, in_other_words))

    def question(self, text: str) -> Question:
        """This question with its reference: the same question, or else the longest subject that it names."""
        if text in self._by_question:
            return self._by_question[text]
        words = re.findall(r"\w+(?:\.\w+)*", text.lower())
        subjects = [word for word in words if word in self._by_subject and len(word) >= _SHORTEST_SUBJECT]
        if not subjects:
            return Question(text, "", "own")
        found = self._by_subject[max(subjects, key=len)]
        return Question(text, found.reference, found.novelty)


def _by_novelty(split: DialogSplit) -> list[tuple[list[Dialog], Novelty]]:
    return [
        (split.training, "trained"),
        (split.held_out_phrasings, "held_out_phrasing"),
        (split.held_out_subjects, "held_out_subject"),
    ]
