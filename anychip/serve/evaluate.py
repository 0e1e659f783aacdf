"""Task files run over a model in this process, or over one behind a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anychip.errors import InputError
from anychip.evals.harness import run_harness
from anychip.evals.language_model import LanguageModel
from anychip.evals.run_tasks import run_task
from anychip.evals.task_file import read_task
from anychip.files import write_json
from anychip.serve.client import ServerModel
from anychip.serve.scoring import EngineModel
from anychip.serve.talker import WeightType, open_talker


def open_model(target: str, *, chat: bool, weights: WeightType = "auto") -> LanguageModel:
    """A run, an export, or the address of a server (http://HOST:PORT/v1)."""
    if target.startswith(("http://", "https://")):
        return ServerModel(target, chat=chat)
    path = Path(target)
    if path.is_file():
        raise InputError("is a recipe; task files are run over models.", where=path, do="Give runs/NAME or an export.")
    return EngineModel(open_talker(path, {}, weights, max_batch=16), target, chat=chat)


def evaluate_tasks(
    model: LanguageModel, tasks: Sequence[Path], *, harness: bool = False, limit: int | None = None
) -> list[dict[str, Any]]:
    """The record of each task file, by our own runner or by lm-eval."""
    if harness:
        return run_harness(model, tasks, limit)
    return [run_task(model, task, limit) for task in [read_task(path) for path in tasks]]


def keep_results(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """As the report and the model card read them."""
    write_json(path, {"tasks": list(records)})


def described(record: dict[str, Any]) -> str:
    """A record as lines of text."""
    return "\n".join(
        f"{record['task']} | {metric} {found['value']:.4f} ± {_error(found)} | {record['documents']:,} documents | "
        f"{record['runner']}, {record['model']}"
        for metric, found in record["metrics"].items()
    )


def _error(found: dict[str, Any]) -> str:
    return "unknown" if found["standard_error"] is None else f"{found['standard_error']:.4f}"
