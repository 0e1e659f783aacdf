"""Task files: what they measure, on a model whose answers are known, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from anychip.errors import InputError
from anychip.evals.language_model import Likelihood, cut, move_spaces
from anychip.evals.run_tasks import mean_with_error, run_task
from anychip.evals.task_file import read_task

CHOICES = [
    {"q": "one", "a": ["x", "yyyy", "z"], "gold": 0},
    {"q": "two", "a": ["x", "yyyy", "z"], "gold": 1},
    {"q": "three", "a": ["x", "yyyy", "z"], "gold": 2},
    {"q": "four", "a": ["x", "yyyy", "z"], "gold": 1},
]
SUMS = [
    {"q": "1 + 1", "answer": "2", "tests": "assert f() == 2"},
    {"q": "2 + 2", "answer": "4", "tests": "assert f() == 4"},
]


class Scripted:
    """Says the sum; of choices it finds x at -2, yyyy at -3 and z at -4 likely, and keeps what it was asked."""

    name = "scripted"

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        self.asked += pairs
        return [Likelihood(-2.0 - ["", "x", "yyyy", "z"].index(after.strip()), False) for _, after in pairs]

    def generate(self, prompts: Sequence[str], stops: Sequence[str], max_new_tokens: int) -> list[str]:
        self.asked += [(prompt, tuple(stops), max_new_tokens) for prompt in prompts]
        return [" 2" for _ in prompts]


def write(folder: Path, documents: Sequence[dict[str, Any]], **fields: Any) -> Path:
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, documents)))
    path = folder / "t.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "task": "tiny",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(folder / "d.jsonl")}},
                "test_split": "test",
                "doc_to_text": "Q: {{q}}?\nA:",
                **fields,
            }
        )
    )
    return path


def choice_task(folder: Path, **fields: Any) -> Path:
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}, {"metric": "acc_norm"}]
    given = {"doc_to_choice": "a", "doc_to_target": "gold", "metric_list": metrics, **fields}
    return write(folder, CHOICES, **{"output_type": "multiple_choice", **given})


def test_choices_by_likelihood_and_by_likelihood_a_character(tmp_path: Path) -> None:
    """x is likeliest (-2 - 1), yyyy a character ((-2 - 2) / 4)."""
    model = Scripted()
    record = run_task(model, read_task(choice_task(tmp_path)))
    assert model.asked[:2] == [("Q: one?\nA:", " x"), ("Q: one?\nA:", " yyyy")]
    error = math.sqrt((0.75**2 + 3 * 0.25**2) / 3 / 4)
    assert record["documents"] == 4 and record["task"] == "tiny"
    assert record["metrics"]["acc"] == {"value": 0.25, "standard_error": pytest.approx(error)}
    assert record["metrics"]["acc_norm"]["value"] == 0.5
    assert run_task(model, read_task(choice_task(tmp_path)), limit=1)["documents"] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"doc_to_choice": ["x", "yyyy", "z"], "doc_to_target": "{{a[gold]}}"},
        {"doc_to_choice": "{{a}}", "doc_to_target": "{{gold}}"},
        {"doc_to_text": "q", "doc_to_target": "gold"},
    ],
)
def test_choices_and_targets_in_every_form(tmp_path: Path, fields: dict[str, Any]) -> None:
    record = run_task(Scripted(), read_task(choice_task(tmp_path, **fields)))
    assert (record["metrics"]["acc"]["value"], record["metrics"]["acc_norm"]["value"]) == (0.25, 0.5)


@pytest.mark.parametrize(("strips", "right"), [(False, 0.0), (True, 0.5)])
def test_generation_is_compared_to_the_letter(tmp_path: Path, strips: bool, right: float) -> None:
    steps = [{"function": "remove_whitespace"}, {"function": "take_first"}]
    settings = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    path = write(
        tmp_path, SUMS, output_type="generate_until", doc_to_target="{{answer}}", generation_kwargs=settings,
        filter_list=[{"name": "strip", "filter": steps}] if strips else None,
        metric_list=[{"metric": "exact_match", "aggregation": "mean"}],
    )  # fmt: skip
    model = Scripted()
    assert run_task(model, read_task(path))["metrics"]["exact_match"]["value"] == right
    assert model.asked[0] == ("Q: 1 + 1?\nA:", ("\n",), 5)


def test_code_is_run(tmp_path: Path) -> None:
    class Coder(Scripted):
        def generate(self, prompts: Sequence[str], stops: Sequence[str], max_new_tokens: int) -> list[str]:
            return ["```python\ndef f():\n    return 2\n```" for _ in prompts]

    path = write(tmp_path, SUMS, output_type="generate_until", metric_list=[{"metric": "code"}],
                 metadata={"tests": "{{tests}}"})  # fmt: skip
    assert run_task(Coder(), read_task(path))["metrics"]["code"]["value"] == 0.5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_fewshot": 3}, "few-shot"),
        ({"output_type": "loglikelihood_rolling"}, "output_type"),
        ({"process_results": "x"}, "process_results"),
        ({"metric_list": [{"metric": "bleu"}]}, "bleu"),
        ({"dataset_path": "gsm8k"}, "not in local JSON"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "cannot be read"),
        ({"test_split": "other"}, "no file for its split"),
        ({"doc_to_text": "{{nothing}}"}, "fails on a document"),
        ({"doc_to_target": "{{q}}"}, "none of the choices"),
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "fails on a document"),
        ({"generation_kwargs": {"do_sample": True}}, "samples"),
    ],
)
def test_what_our_runner_does_not_know_is_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        run_task(Scripted(), read_task(choice_task(tmp_path, **fields)))


@pytest.mark.parametrize("text", ["[1]", "{", "task: x", "a: !function utils.f"])
def test_a_file_that_is_no_task_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError):
        read_task(tmp_path / "t.yaml")


def test_small_rules() -> None:
    assert move_spaces("a  ", "b") == ("a", "  b") and move_spaces("a", " b") == ("a", " b")
    assert cut("one\ntwo.", ["\n", "."]) == "one" and cut("one", ["\n"]) == "one" and cut("one", []) == "one"
    assert mean_with_error([1.0]) == {"value": 1.0, "standard_error": None}
