"""Messages, tools and results as the turns of the model's chat template (Hermes style, as TeleChat2 is trained).

Tags such as <tool_call> are written here and nowhere else. Where the tokenizer has a control token for one, that token
stands for it; a tag that comes inside a user's or a tool's text stays text, and is broken where text is all there is.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from anychip.data.tokenizer import Tokenizer
from anychip.families.templates import Template, prompt_parts
from anychip.serve.api.errors import ApiError
from anychip.serve.api.schema import Message, Tool, ToolCall

THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, END_TOOL_RESPONSE = "<tool_response>", "</tool_response>"
TAGS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, TOOL_RESPONSE, END_TOOL_RESPONSE)

_TAG = re.compile("<(?=/?(?:think|tool_call|tool_response|tools)>)")
_TOOLS_BEFORE = """

# 可用工具
你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,以下是可用工具详情：
<tools>
"""
_TOOLS_AFTER = (
    "\n</tools>\n\n# 调用方法\n你需要遵循工具的要求，使用json格式返回工具名称及参数，并用<tool_call></tool_call>包含。"
    '下方是一个调用模板：\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n'
)

_MARK = re.compile("([0-9a-f]{32})")
_Parts = list[str]


def encode_conversation(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    template: Template = "B",
    *,
    thinking: bool,
) -> list[int]:
    """Ids up to where the model's answer begins; `thinking` opens its reasoning. Tools are told in words, whatever the
    `template` that frames the turns.

    The template lays out marks that nobody can guess, and then each mark is replaced by what it stands for, so text
    is never looked at by a template.
    """
    turns: dict[str, _Parts] = {}
    laid_out = []
    for role, parts in _turns(messages, tools):
        mark = secrets.token_hex(16)
        turns[mark] = parts
        laid_out.append({"role": role, "content": mark})
    special = tokenizer.special_tokens
    found: list[str | int] = []
    for part in prompt_parts(laid_out, special, template):
        found += [part] if isinstance(part, int) else _replace_marks(part, turns, special)
    if thinking:
        found += [special.get(THINK, THINK), "\n"]
    return tokenizer.encode_parts(_joined(found))


def _turns(messages: Sequence[Message], tools: Sequence[Tool]) -> list[tuple[str, _Parts]]:
    turns: list[tuple[str, _Parts]] = []
    results: _Parts = []
    for message in messages:
        if message.role == "tool":
            results += [*(["\n"] if results else []), TOOL_RESPONSE, f"\n{_plain(message.text)}\n", END_TOOL_RESPONSE]
            continue
        if results:
            turns.append(("user", results))
            results = []
        if message.role in ("system", "developer"):
            _add_system(turns, message.text)
        elif message.role == "user":
            turns.append(("user", [_plain(message.text)]))
        else:
            turns.append(("assistant", [message.text, *_calls(message.tool_calls or [], bool(message.text))]))
    if results:
        turns.append(("user", results))
    if tools:
        if turns[0][0] != "system":
            turns.insert(0, ("system", [""]))
        turns[0][1].append(_TOOLS_BEFORE + "\n".join(_described(tool) for tool in tools) + _TOOLS_AFTER)
    return turns


def _add_system(turns: list[tuple[str, _Parts]], text: str) -> None:
    """The templates have one place for a system message, the first: several there become one."""
    if not turns:
        turns.append(("system", [text]))
    elif len(turns) == 1 and turns[0][0] == "system":
        turns[0][1].append(f"\n\n{text}")
    else:
        raise ApiError(400, "messages: system messages must stand before all others.", param="messages")


def _calls(calls: Sequence[ToolCall], after_text: bool) -> _Parts:
    parts: _Parts = []
    for call in calls:
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            raise ApiError(400, "messages: a tool call's arguments are not JSON.", param="messages") from None
        record = _json({"name": call.function.name, "arguments": arguments})
        parts += [*(["\n"] if parts or after_text else []), TOOL_CALL, f"\n{record}\n", END_TOOL_CALL]
    return parts


def _described(tool: Tool) -> str:
    return _json(tool.model_dump(exclude_none=True))


def _json(record: Mapping[str, Any]) -> str:
    """One line in which no tag stands: JSON may write any character as an escape."""
    return _TAG.sub(r"\\u003c", json.dumps(record, ensure_ascii=False))


def _plain(text: str) -> str:
    return _TAG.sub("< ", text)


def _replace_marks(part: str, turns: Mapping[str, _Parts], special: Mapping[str, int]) -> list[str | int]:
    """`part` is text of the template, which may hold marks."""
    found: list[str | int] = []
    for piece in _MARK.split(part):
        if piece in turns:
            found += [special.get(text, text) if text in TAGS else text for text in turns[piece]]
        elif piece:
            found.append(piece)
    return found


def _joined(parts: Sequence[str | int]) -> list[str | int]:
    """Neighbouring texts as one: where they meet, a token may belong to both."""
    joined: list[str | int] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
