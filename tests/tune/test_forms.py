"""Every published form, by content and by name; bad records by file and line; hostile ones without a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversations import tagged_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.data.tokenizer import Tokenizer
from anychip.errors import InputError
from anychip.families.messages import Message, ToolCall
from anychip.families.templates import render
from anychip.tune.dialogs import Dialog
from anychip.tune.forms import FORMS, parse_dialog
from anychip.tune.read import read_dialogs

Q, A = Message("user", "q"), Message("assistant", "a")
TOOL = {"type": "function", "function": {"name": "f", "description": "加"}}
CALL = Message("assistant", "", tool_calls=(ToolCall("f", '{"x": 1}'),))
TOOLS = ('{"type": "function", "function": {"name": "f", "description": "加"}}',)
RENDERED = 'I ask.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
BROKEN = 'I ask.\n<tool_call>\n{"name": "f", "arguments": {"x": \n1}\n</tool_call>'


def bot(text: str) -> dict[str, Any]:
    return {"role": "bot", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


RECORDS: list[tuple[str, dict[str, Any], Dialog]] = [
    ("telechat", {"system": "", "dialog": [user("q"), bot("a")], "multiturn": False, "tool": False},
     Dialog((Q, A), "q")),
    ("telechat", {"system": "s <tool_call>\n\n", "multiturn": True, "tool": True, "dialog": [
        user("q"), bot(RENDERED), user("<tool_response>\nr\n</tool_response>"), bot("a")]},
     Dialog((Message("system", "s <tool_call>\n\n", tagged=True), Q,
             Message("assistant", "I ask.\n", tool_calls=CALL.tool_calls), Message("tool", "r"), A), "q")),
    ("telechat", {"system": "", "tool": True, "dialog": [
        user("q"), bot(BROKEN), user("<tool_response>\nr\n</tool_response>"), bot("a")]},
     Dialog((Q, Message("assistant", BROKEN, tagged=True), Message("tool", "r"), A), "q")),
    ("telechat", {"system": "", "tool": False, "dialog": [user("q"), bot(RENDERED)]},
     Dialog((Q, Message("assistant", RENDERED)), "q")),
    ("telechat-tools", {"conversation": [
        user("q"), {"role": "bot", "content": "", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
        {"role": "tool", "content": "r"}, bot("a")], "tools": json.dumps([TOOL])},
     Dialog((Q, CALL, Message("tool", "r"), A), "q", TOOLS)),
    ("telechat-inline", {"input": "<_user>q0<_bot>a0<_end><_user>q<_bot>", "output": "a"},
     Dialog((Message("user", "q0"), Message("assistant", "a0"), Q, A), "q")),
    ("telechat-inline", {"input": "q", "output": "a<_end>"}, Dialog((Q, A), "q")),
    ("openai", {"messages": [
        {"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": None, "reasoning_content": "t", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}], "tools": [TOOL]},
     Dialog((Message("system", "s"), Q, Message("assistant", "", "t", CALL.tool_calls), Message("tool", "r"),
             Message("assistant", "a", "hm")), "q", TOOLS)),
    ("alpaca", {"instruction": "q", "input": "more", "output": "a", "system": "s", "history": [["q0", "a0"]]},
     Dialog((Message("system", "s"), Message("user", "q0"), Message("assistant", "a0"), Message("user", "q\nmore"), A),
            "q\nmore")),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, Dialog((Q, A), "q")),
    ("sharegpt", {"conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}],
        "system": "s", "tools": json.dumps([TOOL])},
     Dialog((Message("system", "s"), Q, CALL, Message("tool", "r"), A), "q", TOOLS)),
]  # fmt: skip


@pytest.mark.parametrize(("form", "record", "expected"), RECORDS)
def test_every_form_is_known_by_its_content_and_by_its_name(
    form: str, record: dict[str, Any], expected: Dialog
) -> None:
    assert parse_dialog(record, "auto", "here") == expected
    assert parse_dialog(record, form, "here") == expected


def test_all_forms_are_tested() -> None:
    assert {form for form, _, _ in RECORDS} == set(FORMS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tagged_tokenizer()


@pytest.mark.parametrize("answer", [RENDERED, BROKEN])
def test_tools_written_into_the_text_are_rendered_back_to_the_same_text(tokenizer: Tokenizer, answer: str) -> None:
    """Their tags are ids where the tokenizer has them, as the published code encodes these records."""
    results = "<tool_response>\nr\n</tool_response>\n<tool_response>\nr2\n</tool_response>"
    turns = [user("q <tool_call>"), bot(answer), user(results), bot("a")]
    dialog = parse_dialog({"system": "s<tool_call></tool_call>\n\n", "tool": True, "dialog": turns}, "auto", "here")
    parts = [part.value for part in render(dialog.messages, tokenizer.special_tokens, "B", prompt=False)]
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    text = "".join(names[part] if isinstance(part, int) else part for part in parts)
    assert text == (
        f"<_system>s<tool_call></tool_call>\n\n<_user>q <tool_call><_bot>{answer}<_end>\n<_user>{results}<_bot>a<_end>"
    )
    tags = [names[part] for part in parts if isinstance(part, int) and "tool" in names[part]]
    assert tags == ["<tool_call>", "</tool_call>"] * 2 + ["<tool_response>", "</tool_response>"] * 2


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "once upon a time"}, "pretrain"),
        ({"foo": 1}, "no list `messages`"),
        ({"messages": [user("q"), {"role": "assistant", "content": [{"type": "image_url"}]}]}, "no text"),
        ({"messages": [{**user("q"), "reasoning_content": "t"}, bot("a")]}, "Only an answer"),
        ({"messages": [user("q"), {"role": "tool", "content": "r"}, bot("a")]}, "alternate"),
        ({"messages": [user("q"), bot("a"), {"role": "tool", "content": "r"}, bot("a")]}, "alternate"),
        ({"messages": [user("q"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": 1}]}]}, "calls a"),
        ({"messages": [user("q"), {"role": "assistant", "tool_calls": [{"arguments": "{}"}]}]}, "calls a tool"),
        ({"messages": [user("q"), bot("a")], "tools": "[1]"}, "JSON schemas"),
        ({"conversation": [user("q"), bot("a")], "tools": "not json"}, "JSON schemas"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "role 'alien'"),
        ({"conversations": "x"}, "no list `conversations`"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "calls a tool"),
        ({"dialog": {}}, "no list `dialog`"),
        ({"input": "<_end>lost<_user>q", "output": "a"}, "belongs to no turn"),
        ({"input": 3, "output": "a"}, "no text in `input`"),
        ({"instruction": "q", "output": "a", "history": [["only one"]]}, "no list of pairs"),
        ({"instruction": "q"}, "no text"),
        ({"messages": [user("q"), {"role": "assistant", "content": "a", "reasoning_content": "\ud800"}]}, "UTF-16"),
        ({"messages": [user("q"), bot("a")], "tools": [{"name": "\ud800"}]}, "UTF-16"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_dialog_is_named_by_line(tmp_path: Path, record: dict[str, Any], says: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": [user("q"), bot("a")]}, record])))
    with pytest.raises(InputError, match=says) as caught:
        read_dialogs(path)
    assert "d.jsonl, line 2" in str(caught.value) and caught.value.do and len(str(caught.value)) < 600


def test_a_json_list_is_read_item_by_item(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(
        json.dumps([{"instruction": "q", "output": "a"}, {"instruction": "q"}], indent=1), encoding="utf-8-sig"
    )
    with pytest.raises(InputError, match="item 2"):
        read_dialogs(path)
    path.write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    assert read_dialogs(path) == [Dialog((Q, A), "q")]
    for junk in ("{}", "[1", "[NaN]"):
        path.write_text(junk)
        with pytest.raises(InputError):
            read_dialogs(path)


KEYS = st.sampled_from(
    ["messages", "dialog", "conversation", "conversations", "instruction", "input", "output", "history", "tools",
     "tool", "system", "role", "content", "from", "value", "tool_calls", "function", "name", "arguments",
     "reasoning_content"]
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["user", "bot", "gpt", "human", "tool", "function_call", '[{"name": "f"}]', "<_user>q<_bot>"]),
)  # fmt: skip
JUNK = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=5), max_leaves=12)


@settings(max_examples=400, deadline=None)
@given(record=st.dictionaries(KEYS, JUNK, max_size=5), form=st.sampled_from(["auto", *FORMS]))
def test_whatever_a_record_holds_it_is_a_dialog_or_is_refused(record: dict[str, Any], form: str) -> None:
    try:
        dialog = parse_dialog(record, form, "here")
    except InputError as error:
        assert "here" in str(error)
    else:
        assert dialog.messages[-1].role == "assistant"


@settings(max_examples=150, deadline=None)
@given(junk=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(junk)
    with pytest.raises(InputError):
        read_dialogs(path)
