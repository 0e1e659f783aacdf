"""Task files in lm-eval's YAML form, as far as our own runner goes: local data, no few-shot examples, two kinds of
output. Whatever a file asks beyond that is refused by name: lm-eval itself runs it (`--harness`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from anychip.errors import InputError

_METRICS = {"multiple_choice": ("acc", "acc_norm"), "generate_until": ("exact_match", "code")}
_FILTERS = ("take_first", "remove_whitespace")
_PASSED_OVER = {"tag", "group", "task_alias", "validation_split", "training_split", "fewshot_split", "num_fewshot"}
_KNOWN = {
    "task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text", "doc_to_target",
    "doc_to_choice", "target_delimiter", "generation_kwargs", "metric_list", "filter_list", "description", "metadata",
} | _PASSED_OVER  # fmt: skip
_SPLIT_WITHOUT_A_NAME = "train"
Document = Mapping[str, Any]


@dataclass(frozen=True)
class TaskFile:
    """One task. Templates are Jinja or the name of a field; `tests` is the field that holds programs, for `code`."""

    name: str
    path: Path
    kind: Literal["multiple_choice", "generate_until"]
    documents: list[Document]
    text: str
    target: str | int
    choices: str | list[str]
    metrics: tuple[str, ...]
    description: str = ""
    delimiter: str = " "
    stops: tuple[str, ...] = ("\n\n",)
    max_new_tokens: int = 256
    strips: bool = False
    tests: str = ""

    def context(self, document: Document) -> str:
        """What the model reads."""
        return self.description + self.render(self.text, document)

    def render(self, template: str, document: Document) -> str:
        """A field of a document, or a template filled from it."""
        if template in document:
            return str(document[template])
        try:
            return _ENVIRONMENT.from_string(template).render(**document)
        except TemplateError as error:
            raise InputError(f"the template {template!r} fails on a document ({error}).", where=self.path) from None

    def options(self, document: Document) -> list[str]:
        """The answers to choose from."""
        found: Any = self.choices
        if isinstance(found, str):
            found = document[found] if found in document else _list(self.render(found, document))
        if not isinstance(found, list) or len(found) < 2:
            raise InputError("doc_to_choice gives no list of choices for a document.", where=self.path)
        return [self.render(str(choice), document) if isinstance(self.choices, list) else str(choice)
                for choice in found]  # fmt: skip

    def right_option(self, document: Document) -> int:
        """The number of the right one."""
        target: Any = self.target
        if isinstance(target, str):
            target = document[target] if target in document else self.render(target, document)
        options = self.options(document)
        if isinstance(target, str) and target.strip().isdigit():
            target = int(target)
        elif target in options:
            target = options.index(target)
        if not isinstance(target, int) or not 0 <= target < len(options):
            raise InputError(f"doc_to_target {target!r} is none of the choices.", where=self.path)
        return target


_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def read_task(path: Path) -> TaskFile:
    """Raises InputError naming what a file lacks, or asks beyond what our runner does."""
    raw = _mapping(path)
    kind, where = raw.get("output_type", "generate_until"), path
    if unknown := sorted(raw.keys() - _KNOWN):
        _beyond(f"has {unknown[0]}", where)
    if kind not in _METRICS:
        _beyond(f"has output_type {kind!r}", where)
    if raw.get("num_fewshot"):
        _beyond("asks for few-shot examples", where)
    metrics = tuple(_metric(item, kind, where) for item in raw.get("metric_list") or [{"metric": _METRICS[kind][0]}])
    settings = dict(raw.get("generation_kwargs") or {})
    until = settings.pop("until", ["\n\n"])
    longest = settings.pop("max_gen_toks", 256)
    if settings.pop("do_sample", False) or settings.pop("temperature", 0.0) or settings:
        _beyond("samples, or has generation_kwargs of another kind", where)
    tests = str((raw.get("metadata") or {}).get("tests", ""))
    if ("code" in metrics) != bool(tests):
        raise InputError("has the metric code without metadata.tests, the field of programs, or the other way round.",
                         where=where)  # fmt: skip
    for name in ("task", "doc_to_text", "doc_to_target"):
        if name not in raw and not (name == "doc_to_target" and metrics == ("code",)):
            raise InputError(f"lacks {name}.", where=where, do="See lm-eval's guide to task files.")
    if kind == "multiple_choice" and "doc_to_choice" not in raw:
        raise InputError("lacks doc_to_choice.", where=where, do="Give a list, a field or a template.")
    return TaskFile(
        name=str(raw["task"]),
        path=path,
        kind=kind,
        documents=_documents(raw, where),
        text=_template(raw["doc_to_text"], where),
        target=raw.get("doc_to_target", ""),
        choices=raw.get("doc_to_choice", []),
        metrics=metrics,
        description=str(raw.get("description", "")),
        delimiter=str(raw.get("target_delimiter", " ")),
        stops=tuple([until] if isinstance(until, str) else until),
        max_new_tokens=int(longest),
        strips=_strips(raw.get("filter_list"), where),
        tests=tests,
    )


def _mapping(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}).", where=path, do="Give a task file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if "!function" in str(error):
            _beyond("calls Python functions", path)
        raise InputError("is no YAML.", where=path, do="Give a task file in lm-eval's form.") from None
    if not isinstance(raw, dict):
        raise InputError("is no mapping.", where=path, do="Give a task file in lm-eval's form.")
    return raw


def _metric(item: Any, kind: str, where: Path) -> str:
    name = item.get("metric") if isinstance(item, dict) else None
    if name not in _METRICS[kind] or item.get("aggregation", "mean") != "mean":
        _beyond(f"has the metric {name!r} for {kind}", where)
    if item.keys() - {"metric", "aggregation", "higher_is_better"}:
        _beyond(f"gives the metric {name} settings", where)
    return str(name)


def _strips(filters: Any, where: Path) -> bool:
    """One filter at most, of steps that we know."""
    if not filters:
        return False
    steps = [step.get("function") for item in filters for step in item.get("filter", [])]
    if len(filters) > 1 or any(step not in _FILTERS for step in steps):
        _beyond("has filters of another kind", where)
    return "remove_whitespace" in steps


def _documents(raw: Mapping[str, Any], where: Path) -> list[Document]:
    """The test split of local JSON lines."""
    files = (raw.get("dataset_kwargs") or {}).get("data_files")
    split = raw.get("test_split", _SPLIT_WITHOUT_A_NAME)
    if raw.get("dataset_path") != "json" or files is None:
        _beyond("reads data that is not in local JSON files", where)
    named = files if isinstance(files, dict) else {_SPLIT_WITHOUT_A_NAME: files}
    given = named.get(split)
    if not isinstance(given, str):
        raise InputError(f"has no file for its split {split}.", where=where, do="Name it in dataset_kwargs.data_files.")
    path = Path(given)
    beside = where.parent / path
    path = path if path.is_file() or not beside.is_file() else beside
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else [
            json.loads(line) for line in text.splitlines() if line.strip()
        ]  # fmt: skip
    except OSError as error:
        raise InputError(f"its data cannot be read ({error.strerror}: {path}).", where=where) from None
    except ValueError:
        raise InputError(f"its data is no JSON ({path}).", where=where, do="One object a line.") from None
    if not found or not all(isinstance(document, dict) for document in found):
        raise InputError(f"its data holds no objects ({path}).", where=where, do="One object a line.")
    return list(found)


def _template(value: Any, where: Path) -> str:
    if not isinstance(value, str):
        _beyond("has a doc_to_text that is no text", where)
    return str(value)


def _list(text: str) -> Any:
    """A list as a template writes it."""
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _beyond(what: str, where: Path) -> None:
    raise InputError(
        f"{what}, which our own runner does not know.", where=where, do="Run it by lm-eval: anychip eval ... --harness."
    )
