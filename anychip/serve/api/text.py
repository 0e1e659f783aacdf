"""From tokens to what a client sees: text, reasoning and tool calls, none of it before it is certain.

Tokens become text when their UTF-8 is complete; text passes the stop strings, of which no part is ever let out; what
is left is split into reasoning, content and calls at the tags of the model.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anychip.data.tokenizer import Tokenizer
from anychip.serve.api.conversation import END_THINK, END_TOOL_CALL, TAGS, THINK, TOOL_CALL


class TagDecoder:
    """Text of an answer's tokens, tags included; other control tokens are no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tags = {tokenizer.special_tokens[tag]: tag for tag in TAGS if tag in tokenizer.special_tokens}
        self._decoder = tokenizer.stream_decoder()

    def feed(self, token: int) -> str:
        if token in self._tags:
            text = self._decoder.finish() + self._tags[token]
            self._decoder = self._tokenizer.stream_decoder()
            return text
        return self._decoder.feed(token)

    def finish(self) -> str:
        return self._decoder.finish()


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        if not self._stops:
            return text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            out, self._held = self._held[: min(places)], ""
            return out
        return self._let_go(held_back(self._held, self._stops))

    def finish(self) -> str:
        return self._let_go(0)

    def _let_go(self, keep: int) -> str:
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def held_back(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that one of the strings begins with."""
    for length in range(min(len(text), max(map(len, strings)) - 1), 0, -1):
        end = text[-length:]
        if any(string.startswith(end) for string in strings):
            return length
    return 0


@dataclass(frozen=True)
class Call:
    id: str
    name: str
    arguments: str
    """JSON."""


Piece = tuple[Literal["content", "reasoning"], str] | Call


class Splitter:
    """Text -> content, reasoning and calls. `tools` maps the names that may be called to their schemas.

    Reasoning ends at </think>, or begins with <think> where the answer begins with it. A call is let out whole; what
    stands between the tags but is no call of a known tool is content.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]] | None, *, thinking: bool) -> None:
        self._tools = tools
        self._mode: Literal["start", "think", "content", "call"] = "think" if thinking else "start"
        self._held = ""
        self._first = True  # white space at the beginning of a part is not part of it
        self.calls = 0

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        return self._run(last=False)

    def finish(self) -> list[Piece]:
        return self._run(last=True)

    def _run(self, last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._advance(pieces, last):
            pass
        return pieces

    def _advance(self, pieces: list[Piece], last: bool) -> bool:
        """Take what is certain from the held text; whether another mode has begun."""
        if self._mode == "start":
            begun = self._held.lstrip()
            if not last and len(begun) < len(THINK) and THINK.startswith(begun):
                return False
            thinks = begun.startswith(THINK)
            self._mode = "think" if thinks else "content"
            if thinks:
                self._held = begun[len(THINK) :]
            self._first = thinks
            return True
        if self._mode == "call":
            return self._take_call(pieces, last)
        tag = END_THINK if self._mode == "think" else TOOL_CALL
        if self._mode == "content" and self._tools is None:
            self._say(pieces, self._held)
            self._held = ""
            return False
        before, found, after = self._held.partition(tag)
        if found:
            self._say(pieces, before.rstrip("\n"))
            self._held, self._first = after, True
            self._mode = "content" if self._mode == "think" else "call"
            return True
        # A line end is held too: it belongs to a tag that may follow.
        keep = 0 if last else max(held_back(self._held, [tag]), len(self._held) - len(self._held.rstrip("\n")))
        if keep and not last:
            trimmed = self._held[: len(self._held) - keep].rstrip("\n")
            keep = len(self._held) - len(trimmed)
        self._say(pieces, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _say(self, pieces: list[Piece], text: str) -> None:
        if self._first:
            text = text.lstrip("\n")
        if text:
            self._first = False
            pieces.append(("reasoning" if self._mode == "think" else "content", text))

    def _take_call(self, pieces: list[Piece], last: bool) -> bool:
        body, found, after = self._held.partition(END_TOOL_CALL)
        if not found and not last:
            return False
        self._mode, self._held, self._first = "content", after, True
        call = parse_call(body, self._tools or {})
        if call is not None:
            self.calls += 1
            pieces.append(call)
        else:
            self._first = False
            pieces.append(("content", TOOL_CALL + body + found))
        return bool(after)


_CODER = re.compile(r"<param_key>(.*?)</param_key>\s*<param_value>(.*?)</param_value>", re.DOTALL)


def parse_call(body: str, tools: Mapping[str, Mapping[str, Any]]) -> Call | None:
    """What stands between the tags: {"name":..,"arguments":{..}}, or TeleChat3-Coder's name and keys and values."""
    body = body.strip()
    name: Any
    arguments: Any
    if body.startswith("{"):
        try:
            record = json.loads(body)
        except (ValueError, RecursionError):
            return None
        name, arguments = record.get("name"), record.get("arguments", {})
    else:
        name = body.partition("<")[0].strip()
        properties = tools.get(name, {}).get("properties", {})
        arguments = {key.strip(): _typed(value, properties.get(key.strip())) for key, value in _CODER.findall(body)}
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        return None
    return Call(f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False))


def _typed(value: str, schema: Any) -> Any:
    """A value as its schema wants it; text where it is text or no JSON."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
