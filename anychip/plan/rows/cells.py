"""One row of runs.csv with typed access to its cells; notes are searched by pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping

from anychip.plan.rows.run import Incomplete

_SUSPECT_CARDS = {
    "qwen2_72b_32k": "its tokens/s exceed the chip's peak",
    "deepseek2_236B": "36 tokens/s/device is an order below its neighbours",
    "deepseek_coder1_5_7b": "340 tokens/s/device is an order below its neighbours",
    "qwen2_57b": "listed as suspect by the collection's README",
}


class Cells:
    """A row with typed access to its cells; notes are searched by pattern."""

    def __init__(self, row: Mapping[str, str]) -> None:
        self.row = row
        self.notes = row["notes"] or ""
        self.name = f"{row['id']} {row['model_name']}".lower()

    def cell(self, name: str) -> str:
        return (self.row[name] or "").strip()

    def number(self, name: str) -> float | None:
        return float(self.cell(name)) if self.cell(name) else None

    def integer(self, name: str) -> int | None:
        value = self.number(name)
        return None if value is None else round(value)

    def needed(self, name: str) -> int:
        value = self.integer(name)
        if value is None:
            raise Incomplete(f"{name} is not printed")
        return value

    def note(self, pattern: str) -> str | None:
        found = re.search(pattern, self.notes)
        return found.group(1) if found else None

    def refuse(self) -> None:
        """Rows that cannot be used whatever the model."""
        if "disagree" in self.notes or re.search(r"says device num = \d+ but", self.notes):
            raise Incomplete("table and script disagree on the cluster's size")
        for card, why in _SUSPECT_CARDS.items():
            if self.cell("framework") == "MindFormers" and card in self.row["id"]:
                raise Incomplete(f"suspect card: {why}")
        if self.cell("chip") == "Ascend-unreleased":
            raise Incomplete("the chip is not named")
        if "mamba" in self.name:
            raise Incomplete("a state-space model, which the cost model does not describe")
        if "nemotron_3" in self.name or "qwen3_next" in self.name:
            raise Incomplete("a hybrid of attention and state-space layers, which the cost model does not describe")
        if "tp2d" in self.name:
            raise Incomplete("two-dimensional tensor parallelism, which the cost model does not describe")
