"""Tuning by rewards, and what task files measured: the report's sections about answers that a program checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anychip.report.charts import Series, line_chart, smoothed
from anychip.report.inputs import Inputs, finite
from anychip.report.words import Fact, duration, number, text


def rewards(inputs: Inputs) -> dict[str, Any] | None:
    """Rewards by step, the agreement of sampler and training, and held-out success before and after."""
    metrics = inputs.grpo_metrics
    if metrics is None or not any("reward" in row for row in metrics.training):
        return None
    points = [(row["step"], row["reward"]) for row in metrics.training if "reward" in row]
    series = [Series("reward", points, "line-faint"), Series("reward, smoothed", smoothed(points), "line-main")]
    facts = [Fact("Steps", "步数", f"{metrics.training[-1]['step']:,.0f}")]
    for name, english, chinese in (
        ("before", "Right before, held-out questions", "训练前留出题正确率"),
        ("after", "Right after, held-out questions", "训练后留出题正确率"),
    ):
        if (share := number(inputs.success, name, "success")) is not None:
            error = number(inputs.success, name, "standard_error") or 0.0
            facts.append(Fact(english, chinese, f"{share:.1%} ± {error:.1%}"))
    if (questions := number(inputs.success, "questions")) is not None:
        facts.append(Fact("Held-out questions", "留出题数", f"{questions:,.0f}"))
    differences = [row["logprob_difference"] for row in metrics.training if "logprob_difference" in row]
    if differences:
        facts.append(
            Fact(
                "Sampler against training, nats a token, worst step",
                "采样与训练的对数概率差",
                f"{max(differences):.1e}",
            )
        )
    if (seconds := number(inputs.stages, "grpo", "seconds")) is not None:
        facts.append(Fact("Time", "用时", duration(seconds)))
    return {
        "chart": line_chart(series, "reward of sampled answers", "steps 步", y_from_zero=True),
        "facts": facts,
        "answers": _answers(inputs.success),
    }


def _answers(success: object) -> list[dict[str, str]]:
    """Held-out questions with the answers of both models."""
    before, after = (_listed(success, name) for name in ("before", "after"))
    return [
        {
            "question": text(one, "question"),
            "reference": text(one, "reference"),
            "before": text(one, "answer"),
            "after": text(other, "answer"),
        }
        for one, other in zip(before, after, strict=False)
    ]


def _listed(success: object, name: str) -> list[Any]:
    part = success.get(name) if isinstance(success, Mapping) else None
    found = part.get("answers") if isinstance(part, Mapping) else None
    return found if isinstance(found, list) else []


def tasks(inputs: Inputs) -> list[dict[str, str]]:
    """One row for each metric of each task."""
    records = (inputs.tasks or {}).get("tasks")
    rows = []
    for record in records if isinstance(records, list) else []:
        metrics = record.get("metrics") if isinstance(record, Mapping) else None
        for metric, found in metrics.items() if isinstance(metrics, Mapping) else ():
            if (value := number(found, "value")) is None:
                continue
            error = number(found, "standard_error")
            rows.append(
                {
                    "task": text(record, "task"),
                    "metric": str(metric),
                    "value": f"{value:.4f}",
                    "error": "" if error is None else f"{error:.4f}",
                    "documents": f"{finite(record.get('documents')) or 0:,.0f}",
                    "runner": text(record, "runner"),
                }
            )
    return rows
