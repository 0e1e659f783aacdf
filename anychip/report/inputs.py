"""What a run left behind, read so that one missing or half-written file never costs the rest of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anychip.errors import AnychipError
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory

Row = dict[str, float]


@dataclass(frozen=True)
class Metrics:
    """One `metrics.jsonl`: rows of training steps and rows of validations, ordered by step. Where the model grew there
    are two validations: of the old model in `validation`, of the grown one in `after_growth`."""

    training: list[Row]
    validation: list[Row]
    after_growth: list[Row]

    def column(self, name: str) -> list[tuple[float, float]]:
        """(tokens, value) of the training rows that have a finite value."""
        return [(row["tokens"], row[name]) for row in self.training if name in row and "tokens" in row]

    def validated(self, name: str) -> list[tuple[float, float]]:
        """(tokens, value) of all validation rows; tokens are interpolated from the training rows by step."""
        rows = sorted([*self.validation, *self.after_growth], key=lambda row: row["step"])
        return [(self._tokens_at(row["step"]), row[name]) for row in rows if name in row]

    def _tokens_at(self, step: float) -> float:
        rows = [row for row in self.training if "tokens" in row]
        if not rows:
            return step
        per_step = rows[-1]["tokens"] / max(rows[-1]["step"], 1.0)
        return step * per_step


@dataclass(frozen=True)
class Inputs:
    """Everything the report may show; None (or empty) where a run has not come that far."""

    run: RunDirectory
    recipe: Recipe | None
    recipe_text: str
    metrics: Metrics | None
    sft_metrics: Metrics | None
    grpo_metrics: Metrics | None
    success: dict[str, Any] | None
    tasks: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    samples: dict[str, Any] | None
    data: dict[str, Any] | None
    growths: list[dict[str, Any]]
    stages: dict[str, dict[str, Any]]


def read_inputs(run: RunDirectory) -> Inputs:
    """Read what is there. Raises InputError only when the directory is not a run at all."""
    recipe_text = run.recipe_path.read_text(encoding="utf-8") if run.recipe_path.is_file() else ""
    return Inputs(
        run=run,
        recipe=_recipe(run),
        recipe_text=recipe_text,
        metrics=read_metrics(run.logs / "metrics.jsonl"),
        sft_metrics=read_metrics(run.sft / "logs" / "metrics.jsonl")
        or read_metrics(run.sft / "adapter" / "logs" / "metrics.jsonl"),
        grpo_metrics=read_metrics(run.grpo / "logs" / "metrics.jsonl")
        or read_metrics(run.grpo / "adapter" / "logs" / "metrics.jsonl"),
        success=_json_object(run.grpo / "success.json"),
        tasks=_json_object(run.tasks),
        evaluation=_json_object(run.evaluation),
        samples=_json_object(run.root / "samples.json"),
        data=_json_object(run.data / "summary.json"),
        growths=_growths(run),
        stages={
            path.stem: record
            for path in sorted(run.stage_marker("any").parent.glob("*.json"))
            if (record := _json_object(path)) is not None
        },
    )


def read_metrics(path: Path) -> Metrics | None:
    """Rows with a step, numbers only. After a resume the later row of a step wins. None when there are none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    training: dict[float, Row] = {}
    validation: dict[float, Row] = {}
    after_growth: dict[float, Row] = {}
    for line in lines:
        raw = _line(line)
        row = _numbers(raw)
        if "step" not in row:
            continue
        kind = training
        if "validation_loss" in row or "validation_bits_per_byte" in row:
            kind = after_growth if raw.get("when") == "after growth" else validation
        kind[row["step"]] = row
    if not training and not validation:
        return None
    return Metrics(*([rows[step] for step in sorted(rows)] for rows in (training, validation, after_growth)))


def finite(value: object) -> float | None:
    """A number that a chart can show, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer above any float
        return None


def _growths(run: RunDirectory) -> list[dict[str, Any]]:
    """The records of the run's growths, in order."""
    paths = [path for path in run.growth(0).parent.glob("*/growth.json") if path.parent.name.isdecimal()]
    records = [_json_object(path) for path in sorted(paths, key=lambda path: int(path.parent.name))]
    return [record for record in records if record is not None]


def _line(line: str) -> Mapping[str, Any]:
    """One JSON line; nothing for a line that a crash cut short."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, Mapping) else {}


def _numbers(raw: Mapping[str, Any]) -> Row:
    """The finite numbers of a line."""
    return {key: value for key, value in ((key, finite(value)) for key, value in raw.items()) if value is not None}


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _recipe(run: RunDirectory) -> Recipe | None:
    try:
        return run.read_recipe()
    except AnychipError:
        return None
