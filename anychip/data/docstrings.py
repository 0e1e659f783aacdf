"""Questions and answers from real documentation strings of the Python standard library.

The question asks for a module, class, function or method by its full name, in several wordings; the answer is the
first sentence of its documentation. Sources are parsed, never run; what is written in C is inspected.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

from anychip.data.python_sources import documented_members, extension_modules, stdlib_files

PHRASINGS = (
    "What does {} do?",
    "What is {} for?",
    "Explain {}.",
    "Describe {} in one sentence.",
    "What is {}?",
    "Tell me about {}.",
    "How would you summarise {}?",
    "What is the purpose of {}?",
)

# Where users find what other modules define.
_PUBLIC_NAMES = {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_strptime": "time",
}
# Public modules whose functions are partly written in C under another name.
_PARTLY_IN_C = (
    "bisect", "collections", "csv", "datetime", "decimal", "functools", "heapq", "io", "json", "operator", "os",
    "pickle", "random", "socket", "sqlite3", "string", "struct", "subprocess", "threading", "weakref",
)  # fmt: skip
# Applications, platform twins of os and os.path, and a joke.
_SKIPPED_MODULES = {
    "posix", "nt", "ntpath", "idlelib", "lib2to3", "tkinter", "turtledemo", "distutils", "ensurepip", "encodings",
    "antigravity",
}  # fmt: skip
_MIN_ANSWER, _MAX_ANSWER = 20, 240
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)")
# A signature above the text, as C code writes it: `name(arguments) -> result`, or one with two dashes behind it.
_SIGNATURE = re.compile(r"^[\w.]+\(")
_MARKUP = re.compile(r":\w+:`~?([^`]+)`|``?([^`']+)`?[`']")


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about `subject`, such as `os.path.join`, and what the documentation answers."""

    question: str
    answer: str
    subject: str


def documentation_pairs() -> list[QuestionAnswer]:
    """Every documented subject in every wording, sorted by subject; each question once."""
    answers: dict[str, str] = {}
    for subject, text in (*_inspected(), *_parsed()):
        answer = first_sentence(text)
        if answer:
            answers.setdefault(subject, answer)
    return [
        QuestionAnswer(phrasing.format(subject), answer, subject)
        for subject, answer in sorted(answers.items())
        for phrasing in PHRASINGS
    ]


def first_sentence(text: str) -> str | None:
    """The first sentence of a documentation string, on one line, or None where there is no proper one."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", cleandoc(text)) if part.strip()]
    while paragraphs and _SIGNATURE.match(paragraphs[0]):
        # The sentence may follow the signature in the same paragraph, behind `->` and the result, or in the next.
        lines = paragraphs[0].split(" -- ", 1)
        paragraphs[0:1] = lines[1:]
    if not paragraphs:
        return None
    sentence = _MARKUP.sub(lambda match: match.group(1) or match.group(2), paragraphs[0])
    end = _SENTENCE_END.search(sentence)
    sentence = sentence[: end.end()] if end else sentence
    if not sentence.endswith((".", "!", "?")):
        sentence += "."
    proper = sentence[0].isalpha() and len(sentence.split()) >= 3 and sentence[-2] not in ":,;-("
    plain = not any(mark in sentence for mark in (">>>", "::", "XXX", "TODO", "$", "@", " = "))
    if not (proper and plain and _MIN_ANSWER <= len(sentence) <= _MAX_ANSWER):
        return None
    first_word = sentence.partition(" ")[0]
    is_name = first_word in sys.stdlib_module_names or hasattr(builtins, first_word)
    return sentence if is_name else sentence[0].upper() + sentence[1:]


def _parsed() -> Iterator[tuple[str, str]]:
    """(subject, documentation) of everything public in the sources."""
    for relative, path in stdlib_files():
        module = relative.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        module = _PUBLIC_NAMES.get(module, module)
        if module.split(".")[0] in _SKIPPED_MODULES or any(part.startswith("_") for part in module.split(".")):
            continue
        tree = _parse(path)
        if tree is None:
            continue
        text = ast.get_docstring(tree)
        if text and module not in _PUBLIC_NAMES.values():
            yield module, text
        yield from _parsed_members(tree.body, module)


def _parsed_members(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            subject = f"{prefix}.{node.name}"
            text = ast.get_docstring(node)
            if text:
                yield subject, text
            if isinstance(node, ast.ClassDef):
                yield from _parsed_members(node.body, subject)


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _inspected() -> Iterator[tuple[str, str]]:
    """(subject, documentation) of the public objects written in C."""
    for module in extension_modules():
        if not module.__name__.startswith("_") and module.__name__ not in _SKIPPED_MODULES:
            yield from _members(module, "" if module is builtins else module.__name__)
    for name in _PARTLY_IN_C:
        yield from _members(importlib.import_module(name), name)


def _members(owner: object, prefix: str) -> Iterator[tuple[str, str]]:
    for subject, member, text in documented_members(owner, prefix):
        if isinstance(member, type):
            # A class that a module only imports is documented under its own module.
            if getattr(member, "__module__", "").partition(".")[0] not in (prefix.partition(".")[0], "builtins"):
                continue
            yield from ((name, inner_text) for name, _, inner_text in documented_members(member, subject))
        elif prefix and getattr(member, "__module__", None) not in (None, prefix, f"_{prefix}", "builtins", "posix"):
            continue
        yield subject, text
