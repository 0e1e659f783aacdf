"""lm-eval over a model that is in this process or behind a server: an adapter, and a run of task files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from anychip.errors import InputError
from anychip.evals.language_model import LanguageModel

_MAX_NEW_TOKENS = 256


def run_harness(model: LanguageModel, paths: Sequence[Path], limit: int | None = None) -> list[dict[str, Any]]:
    """The record of each task file, as `run_task` makes it. Nothing is fetched: only local files are read.

    Raises InputError without lm-eval, and for files that it refuses.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        lm_eval: Any = import_module("lm_eval")
        task_manager = import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        raise InputError(
            f"lm-eval cannot be imported ({error}).", where="--harness", do='Run: pip install "anychip[evals]"'
        ) from None
    names = [_name(path) for path in paths]
    manager = task_manager(include_path=sorted({str(path.resolve().parent) for path in paths}), include_defaults=False)
    if missing := sorted(set(names) - set(manager.all_tasks)):
        raise InputError(f"lm-eval finds no task {missing[0]}.", where=paths[0], do="Each file needs a name in `task`.")
    found = lm_eval.simple_evaluate(
        model=make_adapter(model), tasks=names, task_manager=manager, limit=limit, log_samples=False
    )
    return [_record(found, name, model.name) for name in names]


def make_adapter(model: LanguageModel) -> Any:
    """The model as an lm_eval.api.model.LM."""
    base: Any = import_module("lm_eval.api.model").LM

    class Adapter(base):
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [(one.log_probability, one.greedy) for one in model.likelihoods([r.args for r in requests])]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [one.log_probability for one in model.likelihoods([("", request.args[0]) for request in requests])]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [self._generate(*request.args) for request in requests]

        def _generate(self, context: str, settings: dict[str, Any]) -> str:
            if settings.get("do_sample") or settings.get("temperature"):
                raise InputError("the task samples; only likeliest continuations are generated.", where="--harness")
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            return model.generate([context], stops, int(settings.get("max_gen_toks", _MAX_NEW_TOKENS)))[0]

    return Adapter()


def _record(found: dict[str, Any], name: str, model: str) -> dict[str, Any]:
    values = found["results"][name]
    metrics = {}
    for key, value in values.items():
        metric, _, suffix = key.partition(",")
        if not suffix or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{suffix}")
        metrics[metric] = {"value": value, "standard_error": error if isinstance(error, float) else None}
    documents = found["n-samples"][name]["effective"]
    return {"task": name, "model": model, "runner": "lm-eval", "documents": documents, "metrics": metrics}


def _name(path: Path) -> str:
    """The task's name; lm-eval's own tags in a file (!function) are passed over here."""

    class Loader(yaml.SafeLoader):
        """Reads names alone."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        raw = Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        raise InputError("cannot be read as YAML.", where=path, do="Give a task file in lm-eval's form.") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("task"), str):
        raise InputError("has no name in `task`.", where=path, do="Give a task file in lm-eval's form.")
    return str(raw["task"])
