"""Shell scripts and argument lists, read without being executed."""

from __future__ import annotations

import re
import shlex

from anychip.errors import InputError

_ASSIGNMENT = re.compile(r"^(?:export\s+)?([A-Za-z_]\w*)=(.*)$", re.DOTALL)
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)(?:\[[@*]\])?(?::?-([^}]*))?\}|\$([A-Za-z_]\w*)")
_QUOTED_ARRAY = re.compile(r'"(\$\{[A-Za-z_]\w*\[[@*]\]\})"')
_DEPTH = 20  # of variables in variables


def arguments_of(text: str) -> dict[str, str]:
    """`--name value` pairs of all arguments in the text; a flag alone is "true". Later ones win, as in argparse."""
    variables: dict[str, str] = {}
    words: list[str] = []
    for line in _lines(text):
        if (match := _ASSIGNMENT.match(line)) and not line.lstrip().startswith("--"):
            value = match.group(2).strip()
            variables[match.group(1)] = value[1:-1] if value[:1] == "(" and value[-1:] == ")" else _unquoted(value)
        elif "--" in line:
            words += _split(_resolved(line, variables))
    found: dict[str, str] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else "true"
        elif name is not None and found[name] == "true":
            found[name] = word
    if not found:
        raise InputError("holds no --arguments.", do="Give a Megatron or MindSpeed script, or its list of arguments.")
    return found


def _lines(text: str) -> list[str]:
    """Whole commands: comments dropped, continued lines and arrays joined."""
    text = re.sub(r"\\\r?\n", " ", text)
    lines, pending = [], ""
    for raw in text.splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        pending = f"{pending} {line}".strip() if pending else line
        opens = re.match(r"^(?:export\s+)?[A-Za-z_]\w*=\(", pending) and not pending.endswith(")")
        quoted = re.match(r'^(?:export\s+)?[A-Za-z_]\w*="', pending) and pending.count('"') % 2 == 1
        if not (opens or quoted):
            lines.append(pending)
            pending = ""
    return [line for line in [*lines, pending] if line]


def _resolved(line: str, variables: dict[str, str]) -> str:
    """Put in what variables were set to. Unknown ones stay and are refused only where a value is needed."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(3)
        return variables.get(name, match.group(2) if match.group(2) is not None else match.group(0))

    line = _QUOTED_ARRAY.sub(r"\1", line)  # each of its elements is a word of its own
    for _ in range(_DEPTH):
        replaced = _REFERENCE.sub(value, line)
        if replaced == line or len(replaced) > 1_000_000:
            break
        line = replaced
    return line


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return line.split()


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
