"""Our own runner of task files: multiple choice by log-likelihood, generation by exact match or by running code. Rules
and numbers are lm-eval's, whose results on the same file are the same (a test compares them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anychip.evals.language_model import LanguageModel
from anychip.evals.task_file import TaskFile
from anychip.progress import progress
from anychip.sandbox import program_in, run_python

_AT_ONCE = 64
Scores = dict[str, list[float]]


def run_task(model: LanguageModel, task: TaskFile, limit: int | None = None) -> dict[str, Any]:
    """`task`, `model`, `runner`, `documents` and, by metric, the mean `value` and its `standard_error`."""
    documents = task.documents[:limit]
    scores: Scores = {metric: [] for metric in task.metrics}
    with progress(task.name, total=len(documents), unit="documents") as bar:
        for start in range(0, len(documents), _AT_ONCE):
            part = documents[start : start + _AT_ONCE]
            found = _choose(model, task, part) if task.kind == "multiple_choice" else _generate(model, task, part)
            for metric, values in found.items():
                scores[metric] += values
            bar.advance(len(part))
    return {
        "task": task.name,
        "model": model.name,
        "runner": "anychip",
        "documents": len(documents),
        "metrics": {metric: mean_with_error(values) for metric, values in scores.items()},
    }


def mean_with_error(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its standard error (of a sample; None for one value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"value": mean, "standard_error": None}
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"value": mean, "standard_error": math.sqrt(variance / len(values))}


def _choose(model: LanguageModel, task: TaskFile, documents: Sequence[Any]) -> Scores:
    """acc: the likeliest choice is right; acc_norm: the likeliest a character of its text is."""
    options = [task.options(document) for document in documents]
    pairs = [
        (task.context(document), task.delimiter + option)
        for document, some in zip(documents, options, strict=True)
        for option in some
    ]
    likelihoods = iter(model.likelihoods(pairs))
    scores: Scores = {metric: [] for metric in task.metrics}
    for document, some in zip(documents, options, strict=True):
        values = [next(likelihoods).log_probability for _ in some]
        by_character = [value / max(1, len(option)) for value, option in zip(values, some, strict=True)]
        right = task.right_option(document)
        for metric, ranked in (("acc", values), ("acc_norm", by_character)):
            if metric in scores:
                scores[metric].append(float(ranked.index(max(ranked)) == right))
    return scores


def _generate(model: LanguageModel, task: TaskFile, documents: Sequence[Any]) -> Scores:
    said = model.generate([task.context(document) for document in documents], task.stops, task.max_new_tokens)
    said = [text.strip() if task.strips else text for text in said]
    scores: Scores = {}
    if "exact_match" in task.metrics:
        targets = [task.render(str(task.target), document) for document in documents]
        scores["exact_match"] = [float(text == target) for text, target in zip(said, targets, strict=True)]
    if "code" in task.metrics:
        scores["code"] = [
            float(run_python(f"{program_in(text)}\n{task.render(task.tests, document)}").passed)
            for text, document in zip(said, documents, strict=True)
        ]
    return scores
