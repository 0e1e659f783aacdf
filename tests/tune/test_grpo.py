"""Tuning by rewards on a tiny model: what is asked, that rewards rise, that a stop costs nothing, that disagreement of
sampler and training stops it, and that processes share the work without changing it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import write_tiny_recipe

from anychip.errors import InputError, UnfitError
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.serve.sampler import EngineSampler
from anychip.stages import open_run, run_stage
from anychip.train.checkpoint import CheckpointStore
from anychip.train.loop import Stopped
from anychip.tune.grpo import GrpoData
from anychip.tune.rollouts import Rollouts, forget_rollouts
from anychip.tune.tasks import Task, load_tasks, parse_task, split_tasks

STEPS, GROUP, ANSWERS = 6, 4, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run, questions beside it, and a reward for answers that hold the letter e."""
    folder = tmp_path_factory.mktemp("grpo")
    tasks = [{"prompt": f"what comes next {n}", "answer": "e"} for n in range(200)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    (folder / "letter_reward.py").write_text("def share(a): return a.answer.count('e') / 8\n")
    opened = open_run(write_tiny_recipe(folder), overrides(folder), folder / "runs")
    run_stage("data", *opened)
    run_stage("train", *opened)
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    rewards = "[{kind: custom, function: 'letter_reward:share'}]"
    grpo = f"{{sources: [{{path: {folder}/t.jsonl}}], rewards: {rewards}, steps: {STEPS}, group_size: {GROUP}, "
    grpo += f"global_batch_size: {ANSWERS}, micro_batch_size: 8, max_new_tokens: 8, seq_length: 48, beta: 0.02}}"
    optimizer = "tune.grpo.optimizer={lr: 1.0e-2, weight_decay: 0.0, schedule: {warmup_steps: 0}}"
    return [f"tune.grpo={grpo}", optimizer, *more]


def opened(folder: Path, name: str, *more: str) -> tuple[Recipe, RunDirectory]:
    """The pretrained run under another name."""
    if not (folder / "runs" / name).exists():
        shutil.copytree(folder / "runs" / "tiny", folder / "runs" / name)
    return open_run(folder / "tiny.yaml", overrides(folder, f"name={name}", *more), folder / "runs")


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def tuned(folder: Path) -> RunDirectory:
    os.chdir(folder)
    recipe, run = opened(folder, "tuned")
    run_stage("grpo", recipe, run)
    return run


def weights(checkpoints: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(checkpoints)
    newest = store.latest()
    assert newest is not None
    return {name: tensor for name, tensor in store.read(newest) if name.startswith("model.")}


def rows(run: RunDirectory, stage: str = ".") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.grpo / stage / "logs" / "metrics.jsonl").read_text().splitlines()]


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_rewards_rise_and_what_was_measured_is_logged(tuned: RunDirectory) -> None:
    found = rows(tuned)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert found[-1]["reward"] > 1.5 * found[0]["reward"] > 0
    assert all(row["logprob_difference_max"] < 1e-4 and row["logprob_difference"] < 1e-5 for row in found)
    assert found[0]["kl"] == pytest.approx(0, abs=1e-9) and found[-1]["kl"] > 1e-4
    assert all(1 <= row["answer_tokens"] <= 8 and 0 <= row["ended"] <= 1 for row in found)


def test_held_out_questions_are_asked_before_and_after(tuned: RunDirectory) -> None:
    record = json.loads((tuned.grpo / "success.json").read_text())
    data = GrpoData(tuned.read_recipe(), tuned)
    asked = {task.dialog.question for task in data.held_out}
    assert record["questions"] == len(asked) > 0 and not asked & {task.dialog.question for task in data.tasks}
    for name in ("before", "after"):
        assert record[name]["answers"][0]["question"] in asked
        assert 0 <= record[name]["success"] <= 1 and record[name]["standard_error"] >= 0
    assert (record["before"]["step"], record["after"]["step"]) == (12, STEPS)


def test_answers_can_be_read(tuned: RunDirectory) -> None:
    shown = json.loads((tuned.grpo / "answers" / "step-3.json").read_text())["answers"]
    assert len(shown) == ANSWERS
    for one in shown:
        assert one["reference"] == "e" and one["scores"][0] == pytest.approx(one["answer"].count("e") / 8)


@pytest.mark.parametrize("iterations", [1, 2])
def test_tuning_that_was_stopped_continues_bit_for_bit(
    folder: Path, tuned: RunDirectory, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 4, the second update by the same answers where there are two."""
    more = [f"tune.grpo.iterations={iterations}"]
    expected = tuned
    if iterations > 1:
        recipe, expected = opened(folder, "twice", *more)
        run_stage("grpo", recipe, expected)
    recipe, run = opened(folder, f"stopped-{iterations}", *more)
    answer = Rollouts.answer

    def stopping(self: Rollouts, engine: Any, batch: Any, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, engine, batch, step)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Rollouts, "answer", stopping)
        run_stage("grpo", recipe, run)
    assert len(rows(run)) == 3
    run_stage("grpo", recipe, run)
    assert same_bits(weights(run.grpo / "checkpoints"), weights(expected.grpo / "checkpoints"))
    assert [row["reward"] for row in rows(run)] == [row["reward"] for row in rows(expected)]


def test_updates_by_the_same_answers_keep_to_the_probabilities_that_wrote_them(folder: Path) -> None:
    """The second update's ratios differ from 1: answers were not made again."""
    recipe, run = opened(folder, "repeated", "tune.grpo.iterations=3")
    run_stage("grpo", recipe, run)
    rewards = [row["reward"] for row in rows(run)]
    assert rewards[0] == rewards[1] == rewards[2] != rewards[3]
    norms = [row["grad_norm"] for row in rows(run)]
    assert norms[0] != norms[1]
    shutil.rmtree(run.grpo / "rollouts")
    (run.stage_marker("grpo")).unlink()
    run_stage("grpo", recipe, run)  # over: nothing is needed any more


def test_answers_that_no_start_needs_are_removed(tmp_path: Path) -> None:
    for step in (1, 4, 7, 10):
        (tmp_path / f"step-{step}.safetensors").write_bytes(b"")
    for step, complete in ((5, True), (6, True), (9, False)):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        if complete:
            (tmp_path / "checkpoints" / f"step-{step:06d}" / "COMPLETE").write_text("")
    forget_rollouts(tmp_path, tmp_path / "checkpoints", 3)
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["step-10", "step-7"]


def test_a_sampler_with_other_weights_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = opened(folder, "wrong")
    load = EngineSampler.load

    def wrong(self: EngineSampler, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(self, ((name, tensor * 1.5 if "lm_head" in name else tensor) for name, tensor in named))

    monkeypatch.setattr(EngineSampler, "load", wrong)
    with pytest.raises(UnfitError, match=r"differ by .* nats a token"):
        run_stage("grpo", recipe, run)
    assert not (run.grpo / "checkpoints").exists()


def test_adapters_are_learned_and_answers_are_those_of_the_merged_model(folder: Path) -> None:
    recipe, run = opened(folder, "adapted", "tune.grpo.lora={rank: 4, alpha: 16}", "tune.grpo.beta=0")
    run_stage("grpo", recipe, run)
    assert all(row["logprob_difference"] < 1e-5 and "kl" not in row for row in rows(run, "adapter"))
    changed = weights(run.grpo / "checkpoints")
    base = weights(run.checkpoints)
    assert {name for name in base if not torch.equal(base[name], changed[name])} == {
        name for name in base if "_proj.weight" in name
    }


def torchrun(folder: Path, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", "-m", "anychip", *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("layout", ["data_parallel_shard", pytest.param("tensor_parallel", marks=pytest.mark.slow)])
def test_processes_share_the_questions_and_write_the_same_answers(
    folder: Path, tuned: RunDirectory, layout: str
) -> None:
    settings = overrides(folder, f"name={layout}", f"parallel.{layout}=2", "tune.grpo.iterations=2")
    shutil.copytree(folder / "runs" / "tiny", folder / "runs" / layout)
    torchrun(folder, "grpo", "tiny.yaml", *(word for setting in settings for word in ("--set", setting)))
    run = RunDirectory(folder / "runs" / layout)
    first, expected = (json.loads((one.grpo / "answers" / "step-1.json").read_text()) for one in (run, tuned))
    assert first == expected
    assert rows(run)[0]["reward"] == pytest.approx(rows(tuned)[0]["reward"])
    assert rows(run)[0]["grad_norm"] == pytest.approx(rows(tuned)[0]["grad_norm"], rel=1e-4)
    assert all(row["logprob_difference"] < 1e-5 for row in rows(run)) and len(rows(run)) == STEPS


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "2 + 2?", "answer": "4"}, ("2 + 2?", "4", "")),
        ({"prompt": "2 + 2?", "answer": 4}, ("2 + 2?", "4", "")),
        (
            {"messages": [{"role": "user", "content": "q"}], "tests": ["a = 1", "assert a"]},
            ("q", "", "a = 1\nassert a"),
        ),
        ({"instruction": "q", "output": "the answer"}, ("q", "the answer", "")),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}, ("q", "x", "")),
    ],
)
def test_questions_in_every_form(record: dict[str, Any], expected: tuple[str, str, str]) -> None:
    task = parse_task(record, "auto", "here")
    assert (task.dialog.question, task.reference, task.tests) == expected
    assert task.dialog.messages[-1].role == "user"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "q"}, "no text in `answer`"),
        ({"prompt": "q", "answer": True}, "no text in `answer`"),
        ({"prompt": "", "answer": "4"}, "no text"),
        ({"prompt": 3, "answer": "4"}, "here"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "4"}, "role"),
        ([], "here"),
    ],
)
def test_a_record_that_is_no_question_is_refused(record: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_task(record, "auto", "here")


def test_puzzles_are_right_and_held_out_by_their_subjects() -> None:
    from anychip.recipe.schema import DialogSource

    tasks = load_tasks([DialogSource(path="puzzle:letters")], "")
    split = split_tasks(tasks)
    assert len(tasks) > 1000 and 0.02 < len(split.held_out) / len(tasks) < 0.08

    def letters(task: Task) -> list[str]:
        return task.dialog.question.rstrip("?").split(": ")[1].split(", ")

    assert all(task.reference == max(letters(task)) and len(set(letters(task))) == 4 for task in tasks)
    assert not {task.dialog.question for task in split.held_out} & {task.dialog.question for task in split.training}
