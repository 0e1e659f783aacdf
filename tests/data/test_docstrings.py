from __future__ import annotations

import pytest

from anychip.data.docstrings import PHRASINGS, QuestionAnswer, documentation_pairs, first_sentence


@pytest.fixture(scope="module")
def pairs() -> list[QuestionAnswer]:
    return documentation_pairs()


def test_thousands_of_subjects_each_in_every_wording(pairs: list[QuestionAnswer]) -> None:
    subjects = {pair.subject for pair in pairs}
    assert len(subjects) > 2000
    assert len(pairs) == len(subjects) * len(PHRASINGS) == len({pair.question for pair in pairs})
    assert pairs == documentation_pairs()


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("os.path.join", "pathname components"),
        ("math.sqrt", "square root"),
        ("len", "number of items"),
        ("str.split", "list of the substrings"),
        ("list.append", "end of the list"),
        ("json.dumps", "JSON formatted"),
        ("collections.deque", "list-like sequence"),
        ("ValueError", "argument value"),
    ],
)
def test_answers_are_what_the_documentation_says(pairs: list[QuestionAnswer], subject: str, words: str) -> None:
    answers = {pair.answer for pair in pairs if pair.subject == subject}
    assert len(answers) == 1
    assert words in answers.pop()


def test_answers_are_one_clean_sentence(pairs: list[QuestionAnswer]) -> None:
    for pair in pairs:
        assert "\n" not in pair.answer
        assert pair.answer[-1] in ".!?"
        assert 20 <= len(pair.answer) <= 240
        assert not any(part.startswith("_") for part in pair.subject.split("."))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return x.  More follows.", "Return x."),
        ("return the sum of all items", "Return the sum of all items."),
        ("Split the text, e.g. by lines, into pieces.  Then stop.", "Split the text, e.g. by lines, into pieces."),
        ("f(x) -> y\n\nCompute the value of y.", "Compute the value of y."),
        ("f(x, y) -- Compute the value of both.", "Compute the value of both."),
        ("Use :class:`Thing` for the ``other`` one.", "Use Thing for the other one."),
        ("f(x) -> y", None),
        ("The following are available::\n\n  a", None),
        (">>> f(1)\n2", None),
        ("", None),
    ],
)
def test_first_sentences(text: str, sentence: str | None) -> None:
    if sentence and len(sentence) < 20:
        sentence = None
    assert first_sentence(text) == sentence
