"""What raw words mean: quotes taken off, variables and arithmetic put in, values split at blanks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from anychip.errors import InputError
from anychip.plan.importers.shell.arithmetic import evaluate
from anychip.plan.importers.shell.words import closing, quoted_end

_NAME = re.compile(r"\$([A-Za-z_]\w*|[0-9@*#?$!-])")
_BRACED = re.compile(r"(#?)([A-Za-z_]\w*|[0-9]+|[@*])(\[[^\]]{0,20}\])?(?:(:?[-+=?])(.*))?", re.DOTALL)
_PLAIN = re.compile(r"[^'\"\\$`]+")
_PLAIN_QUOTED = re.compile(r"[^\\$`]+")
_COMMENTS = re.compile(r"(^|[\s\x00])#[^\n\x00]*")
_DEPTH = 10  # of defaults in defaults
_MOST = 10_000_000  # characters put in for variables, all together


class Missing(str):
    """The text of a reference that has no value here: it counts as empty, and is refused where a number is needed."""


@dataclass
class Variables:
    """Values set so far, and what was found missing: a script starts without arguments and environment here."""

    values: dict[str, str | list[str]] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)  # names without values, in order
    defaults: dict[str, str] = field(default_factory=dict)  # references whose default was taken
    commands: dict[str, None] = field(default_factory=dict)  # substitutions that were not run
    spent: int = 0

    def text(self, name: str) -> str | None:
        """None: not set, or to what has no value here."""
        value = self.values.get(name)
        if value is None or isinstance(value, Missing):
            return None
        return " ".join(value) if isinstance(value, list) else value

    def number(self, name: str) -> str:
        """The value for arithmetic."""
        value = self.text(name)
        if value is None:
            self.unknown[name] = None
            return "?"
        return value

    def words(self, raw: str) -> list[str]:
        """The words that one raw word becomes."""
        split = _Words()
        self._expand(raw.replace("\x00", ""), split, False, 0)
        return split.end()

    def scalar(self, raw: str) -> str:
        """A value as it is assigned: not split."""
        split = _Words()
        self._expand(_without_comments(raw), split, True, 0)
        return split.joined()

    def spend(self, text: str) -> str:
        self.spent += len(text)
        if self.spent > _MOST:
            raise InputError("its variables grow beyond what a script of arguments holds.", do="Write them out.")
        return text

    def _expand(self, raw: str, into: _Words, quoted: bool, depth: int) -> None:
        at = 0
        while at < len(raw):
            letter = raw[at]
            if letter == "'":
                end = raw.find("'", at + 1)
                end = len(raw) if end < 0 else end
                into.add(raw[at + 1 : end], True)
                at = end + 1
            elif letter == '"':
                end = quoted_end(raw, at)
                into.add("", True)
                self._double(
                    _without_comments(raw[at + 1 : end - 1 if raw[end - 1 : end] == '"' else end]), into, depth
                )
                at = end
            elif letter == "\\":
                into.add(raw[at + 1 : at + 2], True)
                at += 2
            elif letter in "$`":
                at = self._reference(raw, at, into, quoted, depth)
            else:
                stop = _end_of(_PLAIN, raw, at)
                into.add(raw[at:stop], True)
                at = stop

    def _double(self, raw: str, into: _Words, depth: int) -> None:
        """What stands between double quotes."""
        at = 0
        while at < len(raw):
            letter = raw[at]
            if letter == "\\":
                into.add(
                    raw[at + 1 : at + 2] if raw[at + 1 : at + 2] in ('"', "$", "`", "\\") else raw[at : at + 2], True
                )
                at += 2
            elif letter in "$`":
                at = self._reference(raw, at, into, True, depth)
            else:
                stop = _end_of(_PLAIN_QUOTED, raw, at)
                into.add(raw[at:stop], True)
                at = stop

    def _reference(self, raw: str, at: int, into: _Words, quoted: bool, depth: int) -> int:
        """Put in what stands at `at`; the index behind it."""
        if raw[at] == "`" or (raw.startswith("$(", at) and not raw.startswith("$((", at)):
            end = closing(raw, at + 1, "(", ")") if raw[at] == "$" else raw.find("`", at + 1) + 1 or len(raw)
            self.commands[raw[at:end][:40]] = None
            into.miss(raw[at:end][:80])
            return end
        if raw.startswith("$((", at):
            end = closing(raw, at + 1, "(", ")")
            value = evaluate(self.scalar_of(raw[at + 3 : end - 2], depth), self.number)
            if value is None:
                into.miss(raw[at:end][:80])
            else:
                into.add(str(value), True)
            return end
        if raw.startswith("${", at):
            end = closing(raw, at + 1, "{", "}")
            self._braced(raw[at + 2 : end - 1], raw[at:end], into, quoted, depth)
            return end
        if match := _NAME.match(raw, at):
            self._put(match.group(1), match.group(0), into, quoted)
            return match.end()
        into.add("$", True)
        return at + 1

    def scalar_of(self, raw: str, depth: int) -> str:
        """Text inside a reference, such as a default."""
        if depth >= _DEPTH:
            return ""
        split = _Words()
        self._expand(raw, split, True, depth + 1)
        return split.joined()

    def _braced(self, inner: str, whole: str, into: _Words, quoted: bool, depth: int) -> None:
        match = _BRACED.fullmatch(inner)
        if not match or match.group(1):
            self.unknown[inner[:40]] = None
            into.miss(whole[:80])
            return
        name, index, operator, word = match.group(2), match.group(3), match.group(4), match.group(5)
        held = self.text(name)
        given = bool(held) if operator and operator.startswith(":") else held is not None
        if operator and operator[-1] == "+":
            if given:
                into.add(self.spend(self.scalar_of(word, depth)), quoted)
        elif operator and operator[-1] in "-=" and not given:
            value = self.scalar_of(word, depth)
            self.defaults[name] = value[:40]
            if operator[-1] == "=":
                self.values[name] = value
            into.add(self.spend(value), quoted)
        elif index and index[1:-1].isdigit() and isinstance(listed := self.values.get(name), list):
            place = int(index[1:-1])
            into.add(self.spend(listed[place] if place < len(listed) else ""), quoted)
        else:
            self._put(name, whole, into, quoted)

    def _put(self, name: str, whole: str, into: _Words, quoted: bool) -> None:
        value = self.values.get(name)
        if name == "#":
            into.add("0", True)
        elif isinstance(value, list):
            into.add_all([self.spend(item) for item in value])
        elif value is None:
            self.unknown[name] = None
            if name not in "@*":
                into.miss(whole[:80])
        elif isinstance(value, Missing):
            into.miss(value)
        else:
            into.add(self.spend(value), quoted)


class _Words:
    """Words under construction: blanks of unquoted values end them."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.open: list[str] | None = None
        self.missing: str | None = None

    def add(self, text: str, whole: bool) -> None:
        if whole:
            self.open = [] if self.open is None else self.open
            self.open.append(text)
            return
        parts = text.split()
        if not parts:
            if text:
                self._close()
            return
        if text[0].isspace():
            self._close()
        for place, part in enumerate(parts):
            if place:
                self._close()
            self.add(part, True)
        if text[-1].isspace():
            self._close()

    def add_all(self, items: list[str]) -> None:
        for place, item in enumerate(items):
            if place:
                self._close()
            self.add(item, True)

    def miss(self, text: str) -> None:
        self.missing = text

    def _close(self) -> None:
        if self.open is not None:
            self.done.append("".join(self.open))
        self.open = None

    def end(self) -> list[str]:
        """All words; one that is nothing but a missing value stays as its reference."""
        self._close()
        return self.done if any(self.done) or self.missing is None else [Missing(self.missing)]

    def joined(self) -> str:
        words = self.end()
        return words[0] if len(words) == 1 else " ".join(words)


def _end_of(pattern: re.Pattern[str], raw: str, at: int) -> int:
    found = pattern.match(raw, at)
    return found.end() if found else at + 1


def _without_comments(raw: str) -> str:
    """Lines of a quoted list of arguments that are commented out were not meant to be passed on."""
    return _COMMENTS.sub(r"\1", raw).replace("\x00", "") if "\n" in raw or "\x00" in raw else raw
