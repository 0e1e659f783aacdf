"""Task files as a stage of a run: results on disk, in the report and in the model card; and by the command line."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny_run import finish, write_tiny_recipe

from anychip.files import write_json
from anychip.interchange.export import export_run
from anychip.report import write_report
from anychip.rundir import RunDirectory
from anychip.stages import open_run, run_stage


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("task-stage")
    documents = [{"q": f"the model {word}", "choices": ["reads", "learns", "text"], "gold": number % 3}
                 for number, word in enumerate(["and", "a", "what", "comes", "next"])]  # fmt: skip
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "d.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (folder / "words.yaml").write_text(yaml.safe_dump(task))
    settings = [f"eval.tasks=[{folder}/words.yaml]", "eval.chat=false"]
    recipe, run = open_run(write_tiny_recipe(folder), settings, folder / "runs")
    for stage in ("data", "train", "tasks"):
        run_stage(stage, recipe, run)
    return run


def test_the_results_are_on_disk_in_the_report_and_in_the_card(run: RunDirectory) -> None:
    (record,) = json.loads(run.tasks.read_text())["tasks"]
    assert record["task"] == "words" and record["documents"] == 5 and record["runner"] == "anychip"
    assert set(record["metrics"]) == {"acc", "acc_norm"} and record["metrics"]["acc"]["standard_error"] > 0
    success = {"questions": 50, "before": {"success": 0.2, "standard_error": 0.05, "answers": []},
               "after": {"success": 0.8, "standard_error": 0.05, "answers": []}}  # fmt: skip
    write_json(run.grpo / "success.json", success)
    (run.grpo / "logs").mkdir()
    (run.grpo / "logs" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.2}\n{"step": 2, "reward": 0.7}\n')
    page, shown = write_report(run).read_text(), f"{record['metrics']['acc']['value']:.4f}"
    assert "words" in page and shown in page and "80.0% ± 5.0%" in page and "20.0% ± 5.0%" in page
    card = (export_run(run) / "README.md").read_text()
    assert f"| words | acc | {shown} |" in card and "20.0% ± 5.0% right before" in card


def test_the_command_line_finds_the_same(run: RunDirectory) -> None:
    folder = run.root.parents[1]
    said = finish(folder, "eval", str(run.root), "--task", "words.yaml", "--output", "found.json")
    (ours,), (theirs,) = (json.loads(path.read_text())["tasks"] for path in (run.tasks, folder / "found.json"))
    assert ours["metrics"] == theirs["metrics"] and "words | acc" in said
