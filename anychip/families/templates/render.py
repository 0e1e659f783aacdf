"""A conversation in a template, as control ids and texts. Every text is encoded by itself, and as text: whatever a user
writes can never become a control id, since only this file puts any."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from anychip.errors import InputError
from anychip.families.messages import Message, ToolCall, message_of, to_json
from anychip.families.templates.styles import STYLES, Style, Template

Kind = Literal["start", "system", "user", "question", "bot", "prefix", "answer", "end", "after"]
_TAGS = re.compile(r"(</?tool_call>|</?tool_response>|</?think>|</?param_key>|</?param_value>)")
_CALL_TAGS = re.compile(r"(</?tool_call>)")


class Part(NamedTuple):
    """A control id, or a text, and what it is to the dialog.

    user: the marker `<_user>` alone; question: everything else a user or a tool says; bot: the marker `<_bot>`;
    prefix: what a prompt holds behind it; answer: what the model says; end: its `<_end>`; after: what follows that.
    `turn` is the number of the message.
    """

    value: str | int
    kind: Kind
    turn: int


def render(
    messages: Sequence[Message],
    special_tokens: Mapping[str, int],
    template: Template = "B",
    tools: Sequence[str] = (),
    *,
    prompt: bool,
    thinking: bool = True,
    parity: bool = False,
) -> list[Part]:
    """`messages` in a template; with `prompt` up to where the next answer begins, else up to the last `<_end>`.

    `tools` are JSON schemas, each a line. Without `thinking` the prompt asks for an answer at once, where the template
    can. `parity` is the published templates to the letter: the identity of TeleChat where no system text is given, a
    line feed behind system text that ends in one, and in D no thinking in any answer. Raises InputError for a role, a
    tool or a thought that the template has no place for, and for a tokenizer without its markers.
    """
    return list(_joined(_Renderer(messages, special_tokens, template, tools, parity).parts(prompt, thinking)))


def prompt_parts(
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, int],
    template: Template = "B",
    tools: Sequence[str] = (),
    *,
    thinking: bool = True,
) -> list[str | int]:
    """A conversation in OpenAI's words as text and control ids, up to where the model's next answer begins."""
    turns = [message_of(message) for message in messages]
    return [part.value for part in render(turns, special_tokens, template, tools, prompt=True, thinking=thinking)]


class _Renderer:
    def __init__(
        self,
        messages: Sequence[Message],
        special_tokens: Mapping[str, int],
        template: Template,
        tools: Sequence[str],
        parity: bool,
    ) -> None:
        self._special, self._name, self._style, self._parity = special_tokens, template, STYLES[template], parity
        self._messages, self._tools = messages, tools
        self._last_question = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)

    def parts(self, prompt: bool, thinking: bool) -> Iterator[Part]:
        self._check()
        style, messages = self._style, self._messages
        if style.starts and "<_start>" in self._special:
            yield Part(self._special["<_start>"], "start", -1)
        yield from self._system()
        for turn, message in enumerate(messages):
            if message.role == "user":
                yield Part(self._special["<_user>"], "user", turn)
                yield Part(message.content, "question", turn)
            elif message.role == "tool":
                yield from self._tool_result(turn, message)
            elif message.role == "assistant":
                yield from self._answer(turn, message)
                if prompt or turn + 1 < len(messages):
                    yield Part(style.after_answer, "after", turn)
        if prompt:
            turn = len(messages)
            yield Part(self._special["<_bot>"], "bot", turn)
            if style.think is not None and (thinking or (self._parity and self._name == "D")):
                yield Part(self._tag("<think>"), "prefix", turn)
                yield Part(style.think, "prefix", turn)
            elif style.closes_think:
                yield Part(self._tag("</think>"), "prefix", turn)

    def _system(self) -> Iterator[Part]:
        style = self._style
        given = self._messages[0].content if self._messages and self._messages[0].role == "system" else None
        text = (style.identity or None) if given is None and self._parity else given
        if text is None and not self._tools and style.system != "always":
            return
        if style.system == "none":
            self._refuse("system messages or tools" if self._tools else "the role 'system'")
        if text is None and not self._tools:
            yield Part(self._special["<_system>"], "system", -1)
            return
        yield Part(self._special["<_system>"], "system", -1)
        tagged = given is not None and self._messages[0].tagged
        yield from self._tagged(text or "", _TAGS, "system", -1) if tagged else [Part(text or "", "system", -1)]
        if self._tools:
            assert style.tools is not None
            before, behind = style.tools
            yield Part(before, "system", -1)
            yield Part("\n".join(self._tools), "system", -1)
            yield from self._tagged(behind, _TAGS, "system", -1)
        elif text is not None and (self._parity or not text.endswith("\n")):
            yield Part(style.after_system, "system", -1)

    def _tool_result(self, turn: int, message: Message) -> Iterator[Part]:
        marker, around = self._style.results, self._style.result_break
        if turn == 0 or self._messages[turn - 1].role != "tool":
            yield Part(self._special[marker], "user" if marker == "<_user>" else "question", turn)
        else:
            yield Part(around, "question", turn)
        yield Part(self._tag("<tool_response>"), "question", turn)
        yield Part(f"{around}{message.content}{around}", "question", turn)
        yield Part(self._tag("</tool_response>"), "question", turn)

    def _answer(self, turn: int, message: Message) -> Iterator[Part]:
        style, content = self._style, message.content
        yield Part(self._special["<_bot>"], "bot", turn)
        if style.closes_think:
            content = content.strip()
        if message.thinking and self._keeps_thinking(turn):
            assert style.think is not None
            yield Part(self._tag("<think>"), "prefix", turn)
            yield Part(style.think, "prefix", turn)
            thought = message.thinking.strip()
            yield Part(f"{thought}\n" if style.think else f"\n{thought}\n", "answer", turn)
            yield Part(self._tag("</think>"), "answer", turn)
            yield Part(style.after_think, "answer", turn)
        elif style.closes_think:
            yield Part(self._tag("</think>"), "prefix", turn)
        yield from (
            self._tagged(content, _CALL_TAGS, "answer", turn) if message.tagged else [Part(content, "answer", turn)]
        )
        for number, call in enumerate(message.tool_calls):
            if style.calls == "json" and number:
                yield Part("\n", "answer", turn)
            yield Part(self._tag("<tool_call>"), "answer", turn)
            yield from self._call(call, turn)
            yield Part(self._tag("</tool_call>"), "answer", turn)
        yield Part(self._special["<_end>"], "end", turn)

    def _call(self, call: ToolCall, turn: int) -> Iterator[Part]:
        if self._style.calls == "json":
            yield Part(f'\n{{"name": {to_json(call.name)}, "arguments": {call.arguments}}}\n', "answer", turn)
            return
        yield Part(call.name, "answer", turn)
        for name, value in json.loads(call.arguments).items():
            for tag, text in (
                ("param_key", name),
                ("param_value", value if isinstance(value, str) else to_json(value)),
            ):
                yield Part(self._tag(f"<{tag}>"), "answer", turn)
                yield Part(text, "answer", turn)
                yield Part(self._tag(f"</{tag}>"), "answer", turn)

    def _keeps_thinking(self, turn: int) -> bool:
        if self._style.keeps == "behind_question":
            return turn > self._last_question
        return turn + 1 == len(self._messages) and not (self._parity and self._name == "D")

    def _tag(self, tag: str) -> str | int:
        """A tag's id where the tokenizer has one, else its text."""
        return self._special.get(tag, tag)

    def _tagged(self, text: str, tags: re.Pattern[str], kind: Kind, turn: int) -> Iterator[Part]:
        """A text whose tags are meant."""
        for piece in tags.split(text):
            yield Part(self._tag(piece) if tags.fullmatch(piece) else piece, kind, turn)

    def _check(self) -> None:
        style, roles = self._style, {message.role for message in self._messages}
        needed = ["<_user>", "<_bot>", "<_end>"]
        if style.system == "always" or (style.system == "given" and ("system" in roles or self._tools)):
            needed.append("<_system>")
        if "tool" in roles:
            needed.append(style.results)
        missing = [name for name in dict.fromkeys(needed) if name not in self._special]
        if missing:
            raise InputError(
                f"the tokenizer has no {' and no '.join(missing)}, which the chat template needs.",
                do="Use the model's own tokenizer, or `anychip generate` for plain continuation.",
            )
        if any(message.role == "system" for message in self._messages[1:]):
            raise InputError("a system message stands behind others.", do="The chat templates have one place: first.")
        if style.tools is None and (self._tools or "tool" in roles or any(m.tool_calls for m in self._messages)):
            self._refuse("tools")
        if style.think is None and any(message.thinking for message in self._messages):
            self._refuse("thinking")

    def _refuse(self, what: str) -> None:
        able = [name for name, style in STYLES.items() if _takes(style, what)]
        raise InputError(
            f"the chat template {self._name} has no place for {what}.",
            do=f"Choose {', '.join(able)} (tune.sft.template), or leave that out.",
        )


def _takes(style: Style, what: str) -> bool:
    if what == "thinking":
        return style.think is not None
    return style.system != "none" and style.tools is not None


def _joined(parts: Iterator[Part]) -> Iterator[Part]:
    """Texts of one kind and turn that stand side by side are one text; empty ones are none."""
    for (is_text, kind, turn), group in groupby(parts, key=lambda p: (isinstance(p.value, str), p.kind, p.turn)):
        if not is_text:
            yield from group
        elif text := "".join(str(part.value) for part in group):
            yield Part(text, kind, turn)
