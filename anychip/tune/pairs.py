"""Pairs of answers to one prompt, the one preferred to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anychip.errors import InputError
from anychip.recipe.schema import DialogSource
from anychip.tune.dialogs import Dialog
from anychip.tune.forms import parse_dialog
from anychip.tune.read import read_records
from anychip.tune.sources import with_system_prompt

EXAMPLE = '{"messages": [{"role": "user", "content": "..."}], "chosen": "...", "rejected": "..."}'


@dataclass(frozen=True)
class Pair:
    """Two dialogs that differ in their last answer alone."""

    chosen: Dialog
    rejected: Dialog

    @property
    def source(self) -> int:
        return self.chosen.source


def load_pairs(sources: list[DialogSource], system_prompt: str) -> list[Pair]:
    """The pairs of all sources, in a fixed order, under the recipe's system prompt."""
    return [
        Pair(
            *(
                replace(with_system_prompt(dialog, system_prompt), source=number)
                for dialog in (pair.chosen, pair.rejected)
            )
        )
        for number, source in enumerate(sources)
        for pair in read_pairs(Path(source.path).expanduser(), source.format)
    ]


def read_pairs(path: Path, form: str = "auto") -> list[Pair]:
    """Every pair of a file. A record holds a prompt in any form of dialogs, or as a text or messages in `prompt`, and
    `chosen` and `rejected`: texts, messages, or lists whose last message is the answer.

    Raises InputError naming the file and line for anything that is not two answers to prefer one of.
    """
    return read_records(path, lambda record, where: parse_pair(record, form, where), EXAMPLE)


def parse_pair(record: object, form: str, where: str) -> Pair:
    if not isinstance(record, dict) or "chosen" not in record or "rejected" not in record:
        raise InputError("has no `chosen` and `rejected`.", where=where, do=f"Each line looks like {EXAMPLE}")
    chosen, rejected = (_dialog(record, record[side], side, form, where) for side in ("chosen", "rejected"))
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise InputError(
            "has a `chosen` and a `rejected` to different prompts.", where=where, do="Give both one prompt."
        )
    if chosen.messages[-1] == rejected.messages[-1]:
        raise InputError("prefers an answer to itself.", where=where, do="Drop the pair.")
    return Pair(chosen, rejected)


def _dialog(record: Mapping[str, Any], answer: object, side: str, form: str, where: str) -> Dialog:
    """The prompt with this answer, read as a dialog."""
    place = f"{where}, {side}"
    prompt = record.get("prompt")
    if isinstance(answer, dict):
        answer = answer.get("content", answer.get("value"))
    if isinstance(answer, list):
        before = [*prompt, *answer] if isinstance(prompt, list) else answer
        return parse_dialog({"messages": before, "tools": record.get("tools")}, "openai", place)
    if not isinstance(answer, str):
        raise InputError("is no answer.", where=place, do=f"Each line looks like {EXAMPLE}")
    said = {"role": "assistant", "content": answer}
    if isinstance(prompt, str):
        return parse_dialog({"messages": [{"role": "user", "content": prompt}, said]}, "openai", place)
    if isinstance(prompt, list):
        return parse_dialog({"messages": [*prompt, said], "tools": record.get("tools")}, "openai", place)
    for field in _TURNS:
        if isinstance(record.get(field), list):
            turn = {"from": "gpt", "value": answer} if field == "conversations" else said
            return parse_dialog({**record, field: [*record[field], turn]}, form, place)
    return parse_dialog({**record, "output": answer}, form, place)


_TURNS = ("messages", "dialog", "conversation", "conversations")
