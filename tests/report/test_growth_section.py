"""A run that grew says when, into what, what proved it and that the loss went on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from test_page import Page, complete_run, write

from anychip.grow.plan import plan_growth
from anychip.grow.proof import Comparison, Proof
from anychip.grow.stage import keep_record
from anychip.grow.stream import Stream
from anychip.recipe.schema import GrowthConfig
from anychip.report import write_report
from anychip.report.charts import Series, line_chart
from anychip.report.growth import growth
from anychip.report.inputs import read_inputs, read_metrics
from anychip.rundir import RunDirectory

WIDER = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
LARGEST = (("fp64", 1.5e-15), ("fp32", 2.5e-7), ("bf16", 3.5e-2))


def grown_run(root: Path) -> RunDirectory:
    """Grown after steps 20 and 30 of 50, with a held-out loss of its own after each growth."""
    run = complete_run(root)
    recipe = run.read_recipe()
    found = [Comparison("all", "exact", name, "random", 0.0, difference, 64) for name, difference in LARGEST]
    found.append(Comparison("all", "stored", "fp32", "random", 0.0, 0.75, 64))
    found.append(Comparison("all", "exact", "fp64", "text", 0.0, 0.0, 64))
    old = recipe.model
    growths: list[tuple[int, dict[str, Any]]] = [(20, WIDER), (30, {"num_hidden_layers": 5})]
    for number, (step, to) in enumerate(growths):
        plan = plan_growth(old, GrowthConfig.model_validate({"at_tokens": 1, "to": to}), 0)
        made = SimpleNamespace(source=SimpleNamespace(step=step), parent_digest="0" * 64, plan=plan)
        keep_record(run.growth(number), cast(Stream, made), Proof(True, found), recipe, 12.0)
        with (run.logs / "metrics.jsonl").open("a") as file:
            file.write(f'\n{{"step": {step}, "when": "after growth", "validation_loss": 0.{number}12345}}')
        old = plan.new
    return run


def test_each_growth_has_a_row_and_a_mark(tmp_path: Path) -> None:
    page = Page(write_report(grown_run(tmp_path)))
    for words in (
        "Growth 增长",
        "hidden size 隐层宽度 32 → 64",
        "query heads 查询头 2 → 4",
        "layers 层数 2 → 5",
        "1.5e-15 / 2.5e-07 / 3.5e-02",
        "proved 已证明",
        "0.410000 → 0.012345",  # held out, after step 20
        "0.273333 → 0.112345",
        "12 s",
    ):
        assert words in page.text, words
    assert "7.5e-01" not in page.text
    assert sum(("class", "mark") in tags.items() for name, tags in page.tags if name == "line") == 4  # 2 in each chart


def test_a_run_that_did_not_grow_says_nothing_about_it(tmp_path: Path) -> None:
    page = Page(write_report(complete_run(tmp_path)))
    assert "Growth" not in page.text and "growth" not in page.text


def test_both_validations_of_the_growth_step_are_kept(tmp_path: Path) -> None:
    metrics = read_metrics(grown_run(tmp_path).logs / "metrics.jsonl")
    assert metrics is not None
    at_growth = [value for tokens, value in metrics.validated("validation_loss") if tokens == 20 * 512]
    assert at_growth == [8.2 / 20, 0.012345]


JUNK = [
    "{",
    "[]",
    '{"step": 20}',
    '{"step": 20, "growth": 3, "proof": {"comparisons": 1}}',
    '{"step": 20, "tokens": null, "growth": {"operators": 1, "parameters": [1, "x"]}}',
]


@pytest.mark.parametrize("junk", JUNK)
def test_a_broken_record_costs_its_own_row_only(tmp_path: Path, junk: str) -> None:
    run = grown_run(tmp_path)
    write(run.growth(0) / "growth.json", junk)
    page = Page(write_report(run))
    assert "layers 层数 2 → 5" in page.text and "hidden size 隐层宽度" not in page.text


def test_rows_stand_in_the_order_of_growth(tmp_path: Path) -> None:
    run = grown_run(tmp_path)
    record = json.loads((run.growth(1) / "growth.json").read_text())
    for number, step in ((10, 45), (2, 40)):
        write(run.growth(number) / "growth.json", json.dumps(record | {"step": step}))
    assert [row.step for row in growth(read_inputs(run))] == ["20", "30", "40", "45"]


def test_a_mark_stands_at_its_value_and_only_within_the_chart() -> None:
    points = [(float(x), 1.0 + x) for x in range(11)]
    root = ElementTree.fromstring(str(line_chart([Series("s", points)], "t", "x", marks=[5.0, 50.0], mark_name="<g>")))
    (mark,) = [line for line in root.iter("line") if line.get("class") == "mark"]
    assert mark.get("x1") == mark.get("x2") == "279.0"  # half way between 52 and 506
    assert mark.find("title") is not None and "<g> at 5" in "".join(mark.itertext())
