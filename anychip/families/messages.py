"""A conversation as every form of data and every template sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from anychip.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class ToolCall:
    """A tool by name, and its arguments as the text of one JSON object."""

    name: str
    arguments: str = "{}"

    @classmethod
    def of(cls, name: str, arguments: Mapping[str, Any]) -> ToolCall:
        return cls(name, to_json(arguments))


@dataclass(frozen=True)
class Message:
    """One turn. `thinking` is what an assistant thinks before `content`; `tool_calls` come behind `content`.

    `tagged`: the tool tags that `content` spells out are meant as tags. Of no other text is anything but text made.
    """

    role: Role
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tagged: bool = False


def to_json(value: object) -> str:
    """JSON as the published templates write it: one line, Chinese as it is."""
    return json.dumps(value, ensure_ascii=False)


def message_of(turn: Mapping[str, Any]) -> Message:
    """A message in OpenAI's words: role, content, reasoning_content, tool_calls. Raises InputError for another one."""
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise InputError(f"the chat template has no role {role!r}.", do=f"Roles: {', '.join(ROLES)}.")
    calls = tuple(_tool_call(call) for call in turn.get("tool_calls") or ())
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise InputError(f"a message of the role {role} has no text in `content`.", do="Give it text.")
    return Message(role, content, turn.get("reasoning_content") or "", calls)


def tools_of(tools: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Tools as templates list them: each one's JSON schema on a line."""
    return tuple(to_json(tool) for tool in tools)


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, Mapping) or not isinstance(function.get("name"), str):
        raise InputError("a tool call has no name, or arguments that are no JSON object.", do="Correct the call.")
    return ToolCall.of(function["name"], value)
