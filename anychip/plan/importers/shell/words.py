"""A script's text as commands of raw words: quotes and variables are still in them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PLAIN = re.compile(r"[^\s'\"\\$`#;&|()<>{}]+")
_BLANK = re.compile(r"[ \t\r]+")
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=")
_CONTINUED = re.compile(r"\\[ \t]*\r?\n")
_COMMENT = re.compile(r"#[^\n\x00]*")
_BEFORE_NAME = re.compile(r"(export|local|readonly|declare|typeset|-\w+)$|[A-Za-z_]\w*\+?=")
_HERE = re.compile(r"<<-?[ \t]*(['\"]?)([\w.-]+)\1")
_REDIRECT = re.compile(r"&?(?:>>|>\||>&|<&|<<<|<|>)&?[ \t]*-?")


@dataclass(frozen=True)
class Command:
    """Words up to a newline or an operator. `line` counts from 1."""

    words: tuple[str, ...]
    line: int


def commands_of(text: str) -> list[Command]:
    """Every simple command in order, comments, redirections and here-documents left out. Reads each character once.

    A bracket that closes stays as the last word ")"; a line's continuation as a character 0.
    """
    return _Lexer(_CONTINUED.sub(" \x00", text.replace("\x00", ""))).commands()


def closing(text: str, start: int, opening: str, closed: str) -> int:
    """Index behind the bracket that closes the one at `start`; the text's length when none does."""
    depth, at = 0, start
    while at < len(text):
        letter = text[at]
        if letter == "\\":
            at += 1
        elif letter == "'" and opening == "(":
            at = _behind(text, at + 1, "'") - 1
        elif letter == opening:
            depth += 1
        elif letter == closed:
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return len(text)


def quoted_end(text: str, start: int) -> int:
    """Index behind the double quote that closes the one at `start`."""
    at = start + 1
    while at < len(text):
        letter = text[at]
        if letter == '"':
            return at + 1
        if letter == "\\":
            at += 2
        elif text.startswith(("$(", "${"), at):
            at = closing(text, at + 1, *("()" if text[at + 1] == "(" else "{}"))
        elif letter == "`":
            at = _behind(text, at + 1, "`")
        else:
            at += 1
    return len(text)


def _behind(text: str, start: int, mark: str) -> int:
    found = text.find(mark, start)
    return len(text) if found < 0 else found + 1


class _Lexer:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.line = text, 0, 1
        self.found: list[Command] = []
        self.words: list[str] = []
        self.word: list[str] = []
        self.begun = 1
        self.started = False  # a word of this command is neither an assignment nor what stands before one
        self.here: list[str] = []  # ends of here-documents that begin at the next newline

    def commands(self) -> list[Command]:
        while self.at < len(self.text):
            self._step()
        self._end_command()
        return self.found

    def _step(self) -> None:
        text, at = self.text, self.at
        letter = text[at]
        if letter == "\n":
            self._end_command()
            self._newline()
        elif letter == "\x00":
            self.at, self.line = at + 1, self.line + 1
        elif blank := _BLANK.match(text, at):
            self._end_word()
            self.at = blank.end()
        elif letter == "#" and not self.word:
            self.at = _COMMENT.match(text, at).end()  # type: ignore[union-attr]  # it matches what begins with #
        elif letter in "\"'`$\\":
            self._take(self._quoted_end(letter))
        elif letter in "<>" or (letter == "&" and text.startswith("&>", at)):
            self._redirect()
        elif letter in ";&|":
            self._operator()
        elif letter in "()":
            self._bracket(letter)
        elif plain := _PLAIN.match(text, at):
            self._take(plain.end())
        else:
            self._take(at + 1)

    def _quoted_end(self, letter: str) -> int:
        text, at = self.text, self.at
        if letter == "'" or letter == "`":
            return _behind(text, at + 1, letter)
        if letter == '"':
            return quoted_end(text, at)
        if letter == "$" and text.startswith(("$(", "${"), at):
            return closing(text, at + 1, *("()" if text[at + 1] == "(" else "{}"))
        return min(at + (2 if letter == "\\" else 1), len(text))

    def _take(self, end: int) -> None:
        piece = self.text[self.at : end]
        if not self.word and not self.words:
            self.begun = self.line
        self.word.append(piece)
        self.line += piece.count("\n") + piece.count("\x00")
        self.at = end

    def _bracket(self, letter: str) -> None:
        """`NAME=(` opens an array, which is one word up to its end; other brackets end a command."""
        if letter == "(" and not self.started and _ARRAY.fullmatch("".join(self.word)):
            self._take(_array_end(self.text, self.at))
            return
        if letter == "(" and self.text.startswith("()", self.at) and self.word:  # a function's name
            self.word.append("()")
            self.at += 2
            self._end_command()
            return
        self._end_word()
        if letter == ")" and self.words:
            self.words.append(")")
        self._end_command()
        self.at += 1

    def _redirect(self) -> None:
        """Leave out a redirection with its target; a here-document is skipped at the end of the line."""
        if here := _HERE.match(self.text, self.at):
            self.here.append(here.group(2))
            self._end_word()
            self.at = here.end()
            return
        if "".join(self.word).isdigit():
            self.word = []
        self._end_word()
        match = _REDIRECT.match(self.text, self.at)
        self.at = match.end() if match else self.at + 1
        if self.text.startswith("(", self.at):
            self.at = closing(self.text, self.at, "(", ")")
            return
        kept, self.words = self.words, []
        while self.at < len(self.text) and self.text[self.at] not in " \t\r\n\x00;&|()<>":
            self._take(self._quoted_end(letter) if (letter := self.text[self.at]) in "\"'`$\\" else self.at + 1)
        self.word, self.words = [], kept

    def _operator(self) -> None:
        self._end_command()
        double = self.text.startswith(";;", self.at)
        if double:
            self.found.append(Command((";;",), self.line))
        self.at += 2 if double else 1

    def _newline(self) -> None:
        self.at, self.line = self.at + 1, self.line + 1
        for end in self.here:
            while self.at < len(self.text):
                stop = _behind(self.text, self.at, "\n")
                read = self.text[self.at : stop].strip()
                self.at, self.line = stop, self.line + 1
                if read == end:
                    break
        self.here = []

    def _end_word(self) -> None:
        if self.word:
            word = "".join(self.word)
            self.started = self.started or not _BEFORE_NAME.match(word)
            self.words.append(word)
            self.word = []

    def _end_command(self) -> None:
        self._end_word()
        if self.words:
            self.found.append(Command(tuple(self.words), self.begun))
            self.words = []
        self.started = False


def _array_end(text: str, start: int) -> int:
    """Index behind the bracket that closes an array; brackets in comments and quotes do not."""
    at, begins = start + 1, True
    while at < len(text):
        letter = text[at]
        if letter == ")":
            return at + 1
        if letter == "#" and begins:
            at = _behind(text, at, "\n")
            continue
        begins = letter in " \t\r\n\x00"
        if letter == '"':
            at = quoted_end(text, at)
        elif letter == "'":
            at = _behind(text, at + 1, "'")
        elif letter == "\\":
            at += 2
        elif text.startswith(("$(", "${"), at):
            at = closing(text, at + 1, *("()" if text[at + 1] == "(" else "{}"))
        else:
            at += 1
    return len(text)


def array_words(body: str) -> list[str]:
    """Raw words between an array's brackets."""
    return [word for command in _Lexer(body).commands() for word in command.words]
