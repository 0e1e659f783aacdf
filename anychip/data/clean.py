"""What a document must be to teach a model: text repaired, and the reason why it is left out, if there is one.

Code and prose both pass: nothing here looks for sentences, and repetition is weighed by characters, so that the
braces of C or the blank lines of Python do not count as repeated lines.
"""

from __future__ import annotations

import re

from anychip.recipe.schema import CleaningConfig

# Terminal escapes, C0 controls but tab and line feed, DEL, C1 controls, and the byte order mark.
_CONTROL = re.compile("\x1b\\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_LINE_ENDS = re.compile("\r\n?")
_SENTENCE_ENDS = (". ", "? ", "! ", "。", "？", "！")
_ALPHANUMERIC = re.compile(r"[^\W_]+")


def normalize(text: str) -> str:
    """Line ends become line feeds, mojibake is repaired (ftfy), control characters go; all else stays as it is.

    Only lines with characters outside ASCII can hold mojibake, so only they are given to ftfy.
    """
    text = _LINE_ENDS.sub("\n", text)
    if not text.isascii():
        text = "\n".join(line if line.isascii() else _repair(line) for line in text.split("\n"))
    return _CONTROL.sub("", text)


def _repair(line: str) -> str:
    import ftfy

    # Curly quotes, ligatures, full-width forms and escapes are meant by whoever wrote them.
    return ftfy.fix_text(
        line,
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        normalization=None,
    )


def reason_to_drop(text: str, config: CleaningConfig) -> str | None:
    """Why a document is left out, or None to keep it. Lengths are in characters."""
    if len(text) < config.min_characters:
        return "too short"
    if len(text) > config.max_characters:
        return "too long"
    lines = text.split("\n")
    # A paragraph on one long line is prose; what has neither lines nor sentences is data.
    sentences = sum(map(text.count, _SENTENCE_ENDS))
    if len(text) / (len(lines) + sentences) > config.max_line_characters:
        return "lines too long"
    alphanumeric = sum(map(len, _ALPHANUMERIC.findall(text)))
    visible = len(text) - text.count(" ") - len(lines) + 1
    if alphanumeric < config.min_alphanumeric_fraction * visible:
        return "too few letters and digits"
    if _repeated_fraction(lines) > config.max_repeated_line_fraction:
        return "repeated lines"
    return None


def _repeated_fraction(lines: list[str]) -> float:
    """Share of the characters that stand on lines seen before in the same document."""
    stripped = [line.strip() for line in lines]
    total = sum(map(len, stripped))
    return 1 - sum(map(len, set(stripped))) / total if total else 0.0
