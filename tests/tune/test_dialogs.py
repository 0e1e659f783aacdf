"""Files of messages, their mistakes, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anychip.errors import InputError
from anychip.families.messages import Message
from anychip.tune.dialogs import Dialog, question_and_answer, split_dialogs
from anychip.tune.read import read_dialogs

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_reads_turns_system_and_the_name_bot(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    path = write(tmp_path / "d.jsonl", {"messages": [system, USER, {"role": "bot", "content": "a"}, USER, BOT]}, "", "")
    (dialog,) = read_dialogs(path)
    assert [message.role for message in dialog.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (dialog.question, dialog.answer) == ("q", "a")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{broken", "not valid JSON"),
        ("[1]", "no list `messages`"),
        ({"messages": "hello"}, "no list `messages`"),
        ({"messages": [{"role": "wizard", "content": "x"}, BOT]}, "role 'wizard'"),
        ({"messages": [{"role": ["user"], "content": "x"}, BOT]}, "role"),
        ({"messages": [USER, {"role": "assistant"}]}, "no text"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "no text"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "UTF-16"),
        ({"messages": [BOT, USER]}, "alternate"),
        ({"messages": [USER, BOT, USER]}, "alternate"),
        ({"messages": [{"role": "system", "content": "s"}]}, "alternate"),
        ({"messages": []}, "alternate"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_says_which_line_is_wrong_and_why(tmp_path: Path, record: object, says: str) -> None:
    path = write(tmp_path / "d.jsonl", {"messages": [USER, BOT]}, record)
    with pytest.raises(InputError) as caught:
        read_dialogs(path)
    assert says in str(caught.value) and "d.jsonl, line 2" in str(caught.value) and caught.value.do


def test_refuses_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no dialogs"):
        read_dialogs(write(tmp_path / "empty.jsonl", "\n  \n"))
    with pytest.raises(InputError, match="cannot be read"):
        read_dialogs(tmp_path / "absent.jsonl")
    (tmp_path / "junk.jsonl").write_bytes(b"\xff\xfe\x00junk")
    with pytest.raises(InputError, match="UTF-8"):
        read_dialogs(tmp_path / "junk.jsonl")


def test_held_out_dialogs_are_disjoint_and_do_not_depend_on_order() -> None:
    dialogs = [question_and_answer(f"{ask} s{i}?", f"a {i}", f"s{i}") for i in range(600) for ask in ("what", "why")]
    split = split_dialogs(dialogs)
    parts = [split.training, split.held_out_phrasings, split.held_out_subjects]
    assert sorted(d.question for part in parts for d in part) == sorted(d.question for d in dialogs)
    trained = {dialog.subject for dialog in split.training}
    assert all(dialog.subject in trained for dialog in split.held_out_phrasings)
    assert not trained & {dialog.subject for dialog in split.held_out_subjects}
    assert 20 < len(split.held_out_subjects) < 120 and 20 < len(split.held_out_phrasings) < 120
    again = split_dialogs(reversed(dialogs))
    for mine, other in zip(parts, [again.training, again.held_out_phrasings, again.held_out_subjects], strict=True):
        assert sorted(d.question for d in mine) == sorted(d.question for d in other)


def test_a_small_set_is_trained_on_whole() -> None:
    dialogs = [Dialog((Message("user", str(i)), Message("assistant", "a")), str(i)) for i in range(99)]
    assert split_dialogs(dialogs).training == dialogs
