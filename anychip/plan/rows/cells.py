"""One row of a table with typed access to its cells; notes are searched by pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping

from anychip.plan.rows.numbers import number_of
from anychip.plan.rows.run import Incomplete

_SUSPECT_CARDS = {
    "qwen2_72b_32k": "its tokens/s exceed the chip's peak",
    "deepseek2_236B": "36 tokens/s/device is an order below its neighbours",
    "deepseek_coder1_5_7b": "340 tokens/s/device is an order below its neighbours",
    "qwen2_57b": "listed as suspect by the collection's README",
}
# Rates of whole tokens and milliseconds: a comma in them parts thousands, no thousandths.
_READ_AS_WHOLE = ("tokens_per_s_per_device", "iteration time (ms)")
_MAY_BE_ZERO = ("moe_experts", "moe_topk", "moe_ffn", "shared_experts", "vpp", "cp", "ep")  # which says: not used
_YES = ("1", "1.0", "true", "yes", "y", "on")
_NO = ("0", "0.0", "false", "no", "n", "off")


class Cells:
    """A row, `number` counted from 1, with typed access to its cells. Raises Incomplete for what cannot be read."""

    def __init__(self, row: Mapping[str, str | None], number: int) -> None:
        self.row = row
        self.place = f"row {number}"
        self.notes = row.get("notes") or ""
        self.name = f"{self.cell('id')} {self.cell('model_name')}".lower()

    def cell(self, name: str) -> str:
        return (self.row.get(name) or "").strip()

    def number(self, name: str) -> float | None:
        """A finite number above 0, or None where none is printed."""
        text = self.cell(name)
        if name in _READ_AS_WHOLE and re.fullmatch(r"\d{1,3},\d{3}", text):
            text = text.replace(",", "")
        return self._read(name, text, whole=False)

    def integer(self, name: str) -> int | None:
        """A whole number above 0, or None where none is printed."""
        value = self._read(name, self.cell(name), whole=True)
        return None if value is None else round(value)

    def _read(self, name: str, text: str, whole: bool) -> float | None:
        try:
            return number_of(text, whole=whole, zero=name in _MAY_BE_ZERO)
        except ValueError as reason:
            raise self.unreadable(name, str(reason)) from None

    def needed(self, name: str) -> int:
        value = self.integer(name)
        if value is None:
            raise Incomplete(f"{name} is not printed")
        return value

    def truth(self, name: str) -> bool | None:
        """Yes or no, or None where nothing is printed."""
        text = self.cell(name).lower()
        if not text:
            return None
        if text not in _YES + _NO:
            raise self.unreadable(name, "is neither 1 nor 0")
        return text in _YES

    def unreadable(self, name: str, why: str) -> Incomplete:
        text = self.cell(name)
        return Incomplete(f"{self.place}, {name}: {text if len(text) <= 40 else text[:40] + '...'!r} {why}")

    def note(self, pattern: str) -> str | None:
        found = re.search(pattern, self.notes)
        return found.group(1) if found else None

    def refuse(self) -> None:
        """Rows that cannot be used whatever the model."""
        if "disagree" in self.notes or re.search(r"says device num = \d+ but", self.notes):
            raise Incomplete("table and script disagree on the cluster's size")
        for card, why in _SUSPECT_CARDS.items():
            if self.cell("framework") == "MindFormers" and card in self.cell("id"):
                raise Incomplete(f"suspect card: {why}")
        if self.cell("chip") == "Ascend-unreleased":
            raise Incomplete("the chip is not named")
        if "mamba" in self.name:
            raise Incomplete("a state-space model, which the cost model does not describe")
        if "nemotron_3" in self.name or "qwen3_next" in self.name:
            raise Incomplete("a hybrid of attention and state-space layers, which the cost model does not describe")
        if "tp2d" in self.name:
            raise Incomplete("two-dimensional tensor parallelism, which the cost model does not describe")
