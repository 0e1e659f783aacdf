"""Templates against published renderings, against their own Jinja, and against what users may write."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conversations import TAGS, as_openai, dialogs
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anychip.errors import InputError
from anychip.families.messages import Message, ToolCall, message_of, tools_of
from anychip.families.templates import JINJA, STYLES, TEMPLATES, Template, prompt_parts, render

MARKERS = ["<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>", "<_observation>"]
SPECIAL = {name: number for number, name in enumerate([*MARKERS, *TAGS])}
NAMES = {number: name for name, number in SPECIAL.items()}


def text_of(parts: list[str | int]) -> str:
    return "".join(NAMES[part] if isinstance(part, int) else part for part in parts)


def rendered(turns: list[dict[str, Any]], template: Template, tools: Any = (), **options: Any) -> str:
    messages = [message_of(turn) for turn in turns]
    parts = render(messages, SPECIAL, template, tools_of(tools), **{"prompt": False, **options})
    return text_of([part.value for part in parts])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, thought: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": thought}


IDENTITY = "你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）研发的人工智能助手。"  # noqa: E501

# Renderings that are published: in the repositories' data and scripts, and in a tool's tests against the shipped Jinja.
PUBLISHED = [
    ("A", [user("hi"), bot("yo"), user("so")], {"prompt": True}, "<_start><_user>hi<_bot>yo<_end><_user>so<_bot>"),
    ("B", [user("hi")], {"prompt": True, "parity": True}, f"<_system>{IDENTITY}\n<_user>hi<_bot>"),
    ("B", [{"role": "system", "content": "s"}, user("hi"), bot("yo"), user("so"), bot("ok")], {},
     "<_system>s\n<_user>hi<_bot>yo<_end>\n<_user>so<_bot>ok<_end>"),
    ("C", [{"role": "system", "content": "s"}, user("hi")], {"prompt": True},
     "<_system>s\n<_user>hi<_bot><think>\n"),
    ("D", [user("q")], {"prompt": True, "thinking": False, "parity": True}, "<_system><_user>q<_bot><think>\n"),
    ("D", [{"role": "system", "content": ""}, user("hi"), bot("answer")], {},
     "<_system>\n<_user>hi<_bot>answer<_end>"),
    ("D", [user("question"), bot("answer", "plan")], {"parity": True}, "<_system><_user>question<_bot>answer<_end>"),
    ("E", [user("hi"), bot("answer")], {}, "<_system><_user>hi<_bot></think>answer<_end>"),
    ("E", [user("hi"), bot("answer", "plan"), user("again"), bot("done")], {},
     "<_system><_user>hi<_bot></think>answer<_end><_user>again<_bot></think>done<_end>"),
    ("E", [user("question"), bot("answer", "plan")], {},
     "<_system><_user>question<_bot><think>\nplan\n</think>answer<_end>"),
    ("E", [user("q")], {"prompt": True}, "<_system><_user>q<_bot><think>"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "turns", "options", "expected"), PUBLISHED)
def test_published_renderings(template: Template, turns: list[Any], options: dict[str, Any], expected: str) -> None:
    assert rendered(turns, template, **options) == expected


def test_tools_of_b_as_in_the_published_data() -> None:
    tool = {"type": "function", "function": {"name": "speech-gen", "description": "TTS"}}
    call = {"name": "speech-gen", "arguments": {"input": "你好", "n": 1}}
    turns = [
        {"role": "system", "content": "s"},
        user("say 你好"),
        {"role": "assistant", "content": "好\n", "tool_calls": [call, call]},
        {"role": "tool", "content": "url"},
        {"role": "tool", "content": "url2"},
        bot("done"),
    ]
    system = (
        "<_system>s\n\n# 可用工具\n你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,"
        "以下是可用工具详情：\n"
        '<tools>\n{"type": "function", "function": {"name": "speech-gen", "description": "TTS"}}\n</tools>\n\n'
        "# 调用方法\n你需要遵循工具的要求，使用json格式返回工具名称及参数，"
        "并用<tool_call></tool_call>包含。下方是一个调用模板：\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n'
    )
    written = '<tool_call>\n{"name": "speech-gen", "arguments": {"input": "你好", "n": 1}}\n</tool_call>'
    assert rendered(turns, "B", [tool]) == (
        f"{system}<_user>say 你好<_bot>好\n{written}\n{written}<_end>\n<_user><tool_response>\nurl\n</tool_response>\n"
        "<tool_response>\nurl2\n</tool_response><_bot>done<_end>"
    )


def test_tools_of_e_as_in_its_parser() -> None:
    call = {"name": "get_weather", "arguments": {"city": "Beijing", "days": 2}}
    turns = [user("q"), {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "22"}]
    found = rendered(turns, "E", [{"name": "get_weather"}], prompt=True)
    assert found.startswith("<_system>\n# Tools\n\nYou may call one or more functions")
    assert found.endswith(
        "...</tool_call><_user>q<_bot></think><tool_call>get_weather<param_key>city</param_key><param_value>Beijing"
        "</param_value><param_key>days</param_key><param_value>2</param_value></tool_call><_end><_observation>"
        "<tool_response>22</tool_response><_bot><think>"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_other_runtimes_render_the_same_text_from_the_jinja(template: Template, data: st.DataObject) -> None:
    """The environment is the one of transformers."""
    able = STYLES[template]
    tools, thinking = able.tools is not None, able.think is not None
    dialog = data.draw(dialogs(system=able.system != "none", tools=tools, thinking=thinking))
    asks = data.draw(st.booleans())
    messages = dialog.messages[:-1] if asks else dialog.messages
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    text = environment.from_string(JINJA[template]).render(
        messages=[as_openai(message) for message in messages],
        tools=[json.loads(tool) for tool in dialog.tools] or None,
        add_generation_prompt=asks,
    )
    assert text == text_of([part.value for part in render(messages, SPECIAL, template, dialog.tools, prompt=asks)])


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_text_of_anybody_makes_a_control_id(template: Template, data: st.DataObject) -> None:
    """The ids depend on the roles, calls and thoughts alone: with harmless words instead they are the same."""
    able = STYLES[template]
    tools, thinking = able.tools is not None, able.think is not None
    dialog = data.draw(dialogs(system=able.system != "none", tools=tools, thinking=thinking))

    def harmless(message: Message) -> Message:
        calls = tuple(
            ToolCall("x", json.dumps(dict.fromkeys(json.loads(c.arguments), "x"))) for c in message.tool_calls
        )
        return Message(message.role, "x", "x" if message.thinking else "", calls)

    def ids(messages: list[Message]) -> list[int]:
        parts = render(messages, SPECIAL, template, dialog.tools, prompt=False)
        return [part.value for part in parts if isinstance(part.value, int)]

    assert ids(list(dialog.messages)) == ids([harmless(message) for message in dialog.messages])


def test_tags_are_text_where_the_tokenizer_has_no_ids_for_them() -> None:
    special = {name: SPECIAL[name] for name in MARKERS}
    turns = [user("q"), bot("a", "t")]
    assert prompt_parts(turns[:1], special, "C") == [4, "q", 5, "<think>\n"]
    parts = render([message_of(turn) for turn in turns], special, "C", prompt=False)
    assert [part.value for part in parts] == [4, "q", 5, "<think>\n", "t\n</think>\na", 2]


@pytest.mark.parametrize(
    ("template", "turns", "says"),
    [
        ("A", [{"role": "system", "content": "s"}, user("q")], "no place for the role 'system'.* Choose B, C, D, E"),
        ("B", [user("q"), bot("a", "thought")], "no place for thinking.* Choose C, D, E"),
        ("B", [user("q"), {"role": "system", "content": "s"}], "stands behind others"),
        ("B", [{"role": "wizard", "content": "s"}], "no role 'wizard'"),
        ("B", [{"role": "assistant", "content": None}], "no text"),
        ("B", [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "[1"}]}], "JSON object"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(template: Template, turns: list[Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        rendered(turns, template)


def test_a_tokenizer_without_the_markers_is_refused() -> None:
    with pytest.raises(InputError, match="<_bot>"):
        prompt_parts([], {"<_user>": 4, "<_end>": 2})
    with pytest.raises(InputError, match="<_observation>"):
        render([Message("user", "q"), Message("tool", "r")], {n: SPECIAL[n] for n in MARKERS[:-1]}, "E", prompt=True)
