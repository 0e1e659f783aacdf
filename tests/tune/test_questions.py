"""Questions come with what the tuning data knows about them."""

from __future__ import annotations

from anychip.tune.dialogs import DialogSplit, question_and_answer
from anychip.tune.questions import Question, choose_questions

SPLIT = DialogSplit(
    training=[
        question_and_answer("What does os.path.join do?", "Join paths.", "os.path.join"),
        question_and_answer("What is os?", "The system.", "os"),
    ],
    held_out_phrasings=[question_and_answer(f"Explain os {n}.", f"System {n}.", "os") for n in range(10)],
    held_out_subjects=[question_and_answer(f"What is json{n}?", f"JSON {n}.", f"json{n}") for n in range(10)],
)


def test_own_questions_are_looked_up_by_wording_then_by_subject() -> None:
    own = ["What does os.path.join do?", "Please explain OS.PATH.JOIN!", "How do I use json3?", "What is love?"]
    assert choose_questions(own, SPLIT, extra=0) == [
        Question("What does os.path.join do?", "Join paths.", "trained"),
        Question("Please explain OS.PATH.JOIN!", "Join paths.", "held_out_phrasing"),
        Question("How do I use json3?", "JSON 3.", "held_out_subject"),
        Question("What is love?", "", "own"),
    ]


def test_held_out_questions_are_spread_over_what_is_held_out() -> None:
    chosen = choose_questions([], SPLIT, extra=2)
    assert [question.novelty for question in chosen] == ["held_out_phrasing"] * 2 + ["held_out_subject"] * 2
    assert [question.question for question in chosen[2:]] == ["What is json2?", "What is json7?"]
    assert choose_questions([], DialogSplit([], [], []), extra=2) == []
