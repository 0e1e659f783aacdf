"""The forms that dialogs are published in, each read into the same messages.

TeleChat's own three: `dialog` with tools already written into the text (telechat), `conversation` with calls as JSON
(telechat-tools), `input` and `output` with the turns before written out with markers (telechat-inline); then OpenAI's
messages, Alpaca and ShareGPT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from anychip.errors import InputError
from anychip.families.messages import Message, Role, ToolCall, to_json, tools_of
from anychip.tune.dialogs import Dialog, check_turns, last_question

EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)
_CALLS = re.compile(r"(.*?)<tool_call>\n(.*?)\n</tool_call>((?:\n<tool_call>\n.*?\n</tool_call>)*)", re.DOTALL)
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_RESULTS = re.compile(r"<tool_response>\n.*?\n</tool_response>(?:\n<tool_response>\n.*?\n</tool_response>)*", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
_MARKERS = re.compile(r"(<_start>|<_system>|<_user>|<_bot>|<_end>)")

Record = Mapping[str, Any]


def parse_dialog(record: object, form: str, where: str) -> Dialog:
    """A record as a dialog; `form` is a key of FORMS, or auto. Raises InputError for anything to learn nothing from."""
    if not isinstance(record, dict):
        _refuse("has no list `messages`: it is no JSON object.", where)
    messages, tools = FORMS[_form_of(record, where) if form == "auto" else form](record, where)
    messages = _without_empty_system(messages)
    for number, message in enumerate(messages, start=1):
        if not _is_text(message):
            raise InputError(f"message {number} holds half of a UTF-16 pair.", where=where, do="Write it in UTF-8.")
    check_turns(messages, where)
    return Dialog(tuple(messages), last_question(messages), tools)


def parse_messages(turns: object, where: str) -> list[Message]:
    """OpenAI's messages: system, user, assistant with calls, tool. Content is text, or parts that are all text."""
    if not isinstance(turns, list):
        _refuse("has no list `messages`.", where)
    return [_message_of(turn, number, where, "content") for number, turn in enumerate(turns, 1)]


def _form_of(record: Record, where: str) -> str:
    """The form whose fields a record has."""
    form = next((form for field, form in _BY_FIELD.items() if field in record), None)
    if form is None and "text" in record:
        raise InputError(
            "is text to pretrain on, not a dialog.", where=where, do="Name the file under data.sources instead."
        )
    if form is None:
        _refuse("has no list `messages`, nor the fields of another form.", where)
    return form


def _openai(record: Record, where: str) -> tuple[list[Message], tuple[str, ...]]:
    return parse_messages(record.get("messages"), where), _tools(record.get("tools"), where)


def _telechat(record: Record, where: str) -> tuple[list[Message], tuple[str, ...]]:
    """{"system", "dialog": [{"role": "user" or "bot", "content"}], "multiturn", "tool"}: with `tool`, the tools, their
    calls and their results are part of the texts."""
    turns = record.get("dialog")
    if not isinstance(turns, list):
        _refuse("has no list `dialog`.", where)
    with_tools = record.get("tool") is True
    messages = [Message("system", _text(record, "system", where), tagged=with_tools)]
    for number, turn in enumerate(turns, 1):
        message = _message_of(turn, number, where, "content")
        messages += _untagged(message, after=messages[-1]) if with_tools else [message]
    return messages, ()


def _telechat_tools(record: Record, where: str) -> tuple[list[Message], tuple[str, ...]]:
    """{"conversation": [...], "tools": JSON text}, where a bot's `tool_calls` are JSON text."""
    turns = record.get("conversation")
    if not isinstance(turns, list):
        _refuse("has no list `conversation`.", where)
    return parse_messages(turns, where), _tools(record.get("tools"), where)


def _telechat_inline(record: Record, where: str) -> tuple[list[Message], tuple[str, ...]]:
    """{"input", "output"}: in `input`, markers written as text separate the turns before the last."""
    pieces = _MARKERS.split(_text(record, "input", where, needed=True))
    answer = _text(record, "output", where, needed=True).removesuffix("<_end>")
    roles: dict[str, Role] = {"<_system>": "system", "<_user>": "user", "<_bot>": "assistant"}
    messages = [Message("user", pieces[0])] if pieces[0].strip() else []
    for marker, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if marker in roles:
            messages.append(Message(roles[marker], text))
        elif text.strip():
            _refuse(f"has text behind {marker} in `input` that belongs to no turn.", where)
    if messages and messages[-1] == Message("assistant", ""):
        messages.pop()
    return [*messages, _with_thought(Message("assistant", answer))], ()


def _alpaca(record: Record, where: str) -> tuple[list[Message], tuple[str, ...]]:
    """{"instruction", "input", "output", "system", "history": [[question, answer], ...]}"""
    question = "\n".join(filter(None, (_text(record, "instruction", where), _text(record, "input", where))))
    messages = [Message("system", _text(record, "system", where))]
    history = record.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(turn) for turn in history):
        _refuse("has a `history` that is no list of pairs of texts.", where)
    for asked, answered in history:
        messages += [Message("user", asked), Message("assistant", answered)]
    answer = _with_thought(Message("assistant", _text(record, "output", where)))
    return [*messages, Message("user", question), answer], ()


def _sharegpt(record: Record, where: str) -> tuple[list[Message], tuple[str, ...]]:
    """{"conversations": [{"from", "value"}], "system", "tools"}; a call is a turn of its own, from `function_call`."""
    turns = record.get("conversations")
    if not isinstance(turns, list):
        _refuse("has no list `conversations`.", where)
    messages = [Message("system", _text(record, "system", where))]
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and "from" not in turn:
            messages.append(_message_of(turn, number, where, "content"))
        elif isinstance(turn, dict) and turn["from"] == "function_call":
            calls = _calls(turn.get("value"), number, where)
            spoken = messages.pop() if messages[-1].role == "assistant" else Message("assistant", "")
            messages.append(Message("assistant", spoken.content, spoken.thinking, (*spoken.tool_calls, *calls)))
        else:
            turn = {**turn, "role": turn["from"]} if isinstance(turn, dict) else turn
            messages.append(_message_of(turn, number, where, "value"))
    return messages, _tools(record.get("tools"), where)


FORMS: dict[str, Callable[[Record, str], tuple[list[Message], tuple[str, ...]]]] = {
    "openai": _openai,
    "telechat": _telechat,
    "telechat-tools": _telechat_tools,
    "telechat-inline": _telechat_inline,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
_BY_FIELD = {
    "messages": "openai",
    "dialog": "telechat",
    "conversation": "telechat-tools",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "output": "telechat-inline",
}


def _message_of(turn: object, number: int, where: str, field: str) -> Message:
    """One turn as a message."""
    role = turn.get("role") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or not isinstance(role, str) or role not in _ROLES:
        shown = ascii(role) if isinstance(role, str | None) else type(role).__name__
        raise InputError(
            f"message {number} has the role {shown[:60]}.", where=where, do=f"Known roles: {', '.join(_ROLES)}."
        )
    content, calls = turn.get(field), _calls(turn.get("tool_calls"), number, where)
    if isinstance(content, list):
        content = _joined_parts(content)
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise InputError(f"message {number} has no text in `{field}`.", where=where, do="Give it text, or drop it.")
    thinking = turn.get("reasoning_content") or turn.get("reasoning") or ""
    if not isinstance(thinking, str):
        raise InputError(f"message {number} has a `reasoning_content` that is no text.", where=where, do="Give text.")
    message = Message(_ROLES[role], content, thinking, calls)
    if (calls or thinking) and message.role != "assistant":
        raise InputError(
            f"message {number} of the role {role} thinks or calls tools.", where=where, do="Only an answer does that."
        )
    return message if thinking else _with_thought(message)


def _joined_parts(parts: list[Any]) -> str | None:
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if len(known) == len(texts) else None


def _with_thought(message: Message) -> Message:
    """An answer that begins with <think>...</think>, with its thinking apart."""
    found = _THOUGHT.fullmatch(message.content) if message.role == "assistant" else None
    return Message("assistant", found[2], found[1].strip(), message.tool_calls) if found else message


def _untagged(message: Message, after: Message) -> list[Message]:
    """A message whose text holds tool tags, with calls and results apart where they can be written back to the same
    text, else with its tags marked as meant."""
    called = bool(after.tool_calls) or after.tagged
    if message.role == "user" and called and after.role == "assistant" and _RESULTS.fullmatch(message.content):
        return [Message("tool", result) for result in _RESULT.findall(message.content)]
    if message.role != "assistant" or "<tool_call>" not in message.content:
        return [message]
    found = _CALLS.fullmatch(message.content)
    calls = [_call_of(text) for text in _CALL.findall(message.content)] if found else []
    known = [call for call in calls if call is not None]
    written = "\n".join(
        f'<tool_call>\n{{"name": {to_json(call.name)}, "arguments": {call.arguments}}}\n</tool_call>' for call in known
    )
    if found and f"{found[1]}{written}" == message.content:
        return [Message("assistant", found[1], message.thinking, tuple(known))]
    return [Message("assistant", message.content, message.thinking, tagged=True)]


def _call_of(text: str) -> ToolCall | None:
    try:
        call = loads(text)
    except ValueError:
        return None
    named = isinstance(call, dict) and call.keys() == {"name", "arguments"}
    if not named or not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        return None
    return ToolCall.of(call["name"], call["arguments"])


def _calls(value: object, number: int, where: str) -> tuple[ToolCall, ...]:
    """Calls as OpenAI writes them, or by name and arguments, or all of that as JSON text."""
    calls = _from_text(value)
    calls = [calls] if isinstance(calls, dict) else calls
    parsed = []
    for call in calls if isinstance(calls, list) else [None] if calls else []:
        call = call.get("function", call) if isinstance(call, dict) else {}
        name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
        arguments = _from_text(arguments) or {}
        if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
            raise InputError(
                f"message {number} calls a tool without a name, or with arguments that are no JSON object.",
                where=where,
                do='A call is {"name": "...", "arguments": {...}}.',
            )
        parsed.append(ToolCall.of(name, arguments))
    return tuple(parsed)


def _tools(value: object, where: str) -> tuple[str, ...]:
    tools = _from_text(value)
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        _refuse("has `tools` that are no list of JSON schemas.", where)
    if not _encodable("".join(lines := tools_of(tools))):
        _refuse("has `tools` with half of a UTF-16 pair.", where)
    return lines


def _from_text(value: object) -> Any:
    """A value that may be given as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value if not isinstance(value, str) else None
    try:
        return loads(value)
    except ValueError:
        return value


def _text(record: Record, field: str, where: str, needed: bool = False) -> str:
    value = record.get(field)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        _refuse(f"has no text in `{field}`.", where)
    return value


def _is_pair(turn: object) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _without_empty_system(messages: list[Message]) -> list[Message]:
    first = messages[0] if messages else None
    return messages[1:] if first is not None and first.role == "system" and not first.content.strip() else messages


def _is_text(message: Message) -> bool:
    calls = "".join(f"{call.name}{call.arguments}" for call in message.tool_calls)
    return _encodable(f"{message.content}{message.thinking}{calls}")


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def loads(text: str) -> Any:
    """JSON without its extensions NaN and Infinity. Raises ValueError for anything that is none."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(what: str, where: str) -> NoReturn:
    raise InputError(what, where=where, do=f"Each line looks like {EXAMPLE}")
