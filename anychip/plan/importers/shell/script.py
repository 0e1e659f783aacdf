"""A script's assignments in order, and the command whose arguments describe the training."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

from anychip.plan.importers.shell.conditions import holds, matches, value_of
from anychip.plan.importers.shell.expand import Variables
from anychip.plan.importers.shell.words import Command, array_words, commands_of

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DECLARING = ("export", "local", "readonly", "declare", "typeset")
_DROPPED = ("{", "}", "time", "!", "do", "then", "else")
_LOOPS = ("for", "while", "until", "select")
_QUIET = ("echo", "printf", "mkdir", "cd", "set", "exit", "return", "cp", "rm", "ls", "cat", "pip", "pip3", "trap")
_NESTED = re.compile(r"(?:^|\s)--[A-Za-z]")
_LISTED = 8  # of things that a note names


@dataclass(frozen=True)
class Read:
    """Words of the training command; what changes their meaning; variables by their last values."""

    words: list[str]
    notes: list[str]
    variables: Variables


def read_script(text: str, marker: str) -> Read:
    """The words of the last command that has the argument `marker`, or of all commands when none has."""
    walk = _Walk()
    for command in commands_of(text):
        walk.command(command)
    marked = [words for words in walk.found if any(word.split("=")[0] == marker for word in words)]
    if len(marked) > 1:
        walk.notes.append(f"{len(marked)} commands have {marker}; the last one was taken")
    words = marked[-1] if marked else [word for words in walk.found for word in words]
    return Read(words, [*walk.notes, *walk.summary()], walk.variables)


@dataclass
class _Block:
    """An `if`, `case`, loop or function that is open. `outer`: whether what is around it is read."""

    kind: str
    outer: bool
    line: int
    active: bool = False
    taken: bool = False
    heading: bool = True  # its condition or pattern is being read
    condition: list[tuple[str, ...]] = field(default_factory=list)
    subject: str | None = ""


class _Walk:
    def __init__(self) -> None:
        self.variables = Variables()
        self.found: list[list[str]] = []
        self.notes: list[str] = []
        self.blocks: list[_Block] = []
        self.branches: list[str] = []
        self.sourced: list[str] = []

    @property
    def active(self) -> bool:
        return not self.blocks or self.blocks[-1].active

    def command(self, command: Command) -> None:
        words = command.words
        block = self.blocks[-1] if self.blocks else None
        if block and block.kind == "case" and block.heading and words[0] != "esac":
            words = self._pattern(block, words)
        while words:
            if words[0] in ("if", "elif", "then", "else", "fi", "case", "esac", ";;", *_LOOPS, "do", "done"):
                words = self._keyword(words, command.line)
            elif self.blocks and self.blocks[-1].heading and self.blocks[-1].kind != "case":
                self.blocks[-1].condition.append(words)
                return
            elif words[0] in _DROPPED or words[0].endswith("()"):
                words = words[1:]
            elif words[0] == "function":
                words = words[2:]
            else:
                kept = words[:-1] if words[-1] == ")" else words
                if self.active and kept:
                    self._simple(kept)
                return

    def _keyword(self, words: tuple[str, ...], line: int) -> tuple[str, ...]:
        """Open, turn or close a block; the words that are left of the command."""
        word, rest = words[0], words[1:]
        block = self.blocks[-1] if self.blocks else None
        if word == "if" or word in _LOOPS:
            self.blocks.append(_Block("if" if word == "if" else "loop", self.active, line))
            if word == "for" and len(rest) > 2 and rest[1] == "in" and self.blocks[-1].outer:
                self.variables.values[rest[0]] = (self.variables.words(rest[2]) or [""])[0]
                self.branches.append(f"line {line} `for {rest[0]}`: once, with its first value")
            return rest if word == "if" else ()
        if word == "case":
            subject = value_of(rest[0], self.variables) if rest and self.active else ""
            self.blocks.append(_Block("case", self.active, line, subject=subject))
            return self._pattern(self.blocks[-1], rest[2:])
        if block is None:
            return rest
        if word in ("fi", "done", "esac"):
            self.blocks.pop()
        elif word == ";;":
            block.heading, block.active = block.kind == "case", False
        elif word == "elif":
            block.heading, block.active, block.line, block.condition = True, False, line, []
        elif word == "else":
            block.heading, block.active = False, block.outer and not block.taken
            if block.active:
                self.branches.append(f"line {line} `else`: read")
                block.taken = True
        elif block.heading and (word == "then" or block.kind == "loop"):
            self._begin(block)
        return rest

    def _begin(self, block: _Block) -> None:
        """Whether the branch of a condition is read: what cannot be decided counts as true."""
        block.heading, block.active = False, block.outer and not block.taken
        if block.kind == "loop" or not block.active:
            return
        verdict = holds(block.condition[0], self.variables) if len(block.condition) == 1 else None
        shown = " ; ".join(" ".join(words) for words in block.condition)[:60]
        said = {True: "holds, its branch was read", False: "does not hold", None: "unknown, its branch was read"}
        self.branches.append(f"line {block.line} `{shown}`: {said[verdict]}")
        block.active = block.taken = verdict is not False

    def _pattern(self, block: _Block, words: tuple[str, ...]) -> tuple[str, ...]:
        """Patterns up to the bracket that closes them; the words behind it."""
        if ")" not in words:
            block.condition.append(words)
            return ()
        end = words.index(")")
        patterns = [word for part in (*block.condition, words[:end]) for word in part]
        block.heading, block.condition = False, []
        block.active = block.outer and not block.taken
        if block.active:
            subject = block.subject
            block.active = subject is None or any(matches(self.variables.scalar(word), subject) for word in patterns)
            block.taken = block.active
        if block.active:
            self.branches.append(f"line {block.line} `case`: {'|'.join(patterns)[:40]} was read")
        return words[end + 1 :]

    def _simple(self, words: tuple[str, ...]) -> None:
        """An assignment is kept, arguments are collected; everything else is passed over."""
        declaring = words[0] in _DECLARING
        rest = [word for word in words[declaring:] if not (declaring and word.startswith("-"))]
        assignments = 0
        while assignments < len(rest) and _ASSIGNMENT.fullmatch(rest[assignments]):
            assignments += 1
        if declaring or assignments == len(rest):
            for word in rest[:assignments]:
                self._assign(word)
            return
        rest = rest[assignments:]  # what stands before a command holds for that command only
        if rest[0] in ("source", ".") and len(rest) > 1:
            self.sourced.append(rest[1][:60])
        elif rest[0] not in _QUIET:
            self._collect([word for raw in rest for word in self.variables.words(raw)], rest[0].startswith("--"))

    def _assign(self, word: str) -> None:
        match = _ASSIGNMENT.fullmatch(word)
        if match is None:
            return
        name, added, raw = match.groups()
        values, value = self.variables.values, self._value(raw)
        before = values.get(name)
        if not added or before is None:
            values[name] = value
        elif isinstance(before, list) or isinstance(value, list):
            values[name] = [*_as_list(before), *_as_list(value)]
        else:
            values[name] = self.variables.spend((self.variables.text(name) or "") + value)

    def _value(self, raw: str) -> str | list[str]:
        if not raw.startswith("("):
            return self.variables.scalar(raw)
        return [word for item in array_words(raw[1:].removesuffix(")")) for word in self.variables.words(item)]

    def _collect(self, words: list[str], bare: bool) -> None:
        words = [part for word in words for part in _parts(word)]
        if bare and self.found:  # a list of arguments that goes on
            self.found[-1] += words
        elif any(word.startswith("--") for word in words):
            self.found.append(words)

    def summary(self) -> list[str]:
        variables, said = self.variables, []
        if self.branches:
            said.append(f"of its conditions: {_few(self.branches, '; ')}")
        if self.sourced:
            said.append(f"files that it reads were not followed: {_few(self.sourced)}")
        if variables.defaults:
            taken = [f"{name}={value}" for name, value in variables.defaults.items()]
            said.append(f"defaults were taken, as no arguments and no environment are known: {_few(taken)}")
        if names := [f"${name}" for name in variables.unknown if name not in ("@", "*")]:
            said.append(f"variables that nothing sets were taken as empty: {_few(names)}")
        if "@" in variables.unknown or "*" in variables.unknown:
            said.append("it passes on arguments of its own ($@), which are not known")
        if variables.commands:
            said.append(f"commands whose output it uses were not run: {_few(list(variables.commands))}")
        return said


def _as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else value.split()


def _parts(word: str) -> list[str]:
    """A command given as one word (`bash -c "..."`, `eval`) is taken apart."""
    if not (" " in word or "\n" in word) or not _NESTED.search(word):
        return [word]
    try:
        return shlex.split(word) if len(word) < 100_000 else word.split()
    except ValueError:
        return word.split()


def _few(names: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return between.join(" ".join(name.split()) for name in names[:_LISTED]) + more
