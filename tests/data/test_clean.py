from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import make_recipe, sentence, write_jsonl

from anychip.data.clean import normalize, reason_to_drop
from anychip.data.pipeline import clean_corpus
from anychip.data.readers import list_files
from anychip.data.split import hold_one_out, side
from anychip.errors import AnychipError, InputError
from anychip.recipe import Recipe
from anychip.recipe.schema import CleaningConfig

C_CODE = "int f(int x)\n{\n    if (x) {\n        g();\n    }\n    return h(x);\n}\n\n" * 3 + "int last;\n" * 2


def clean(recipe: Recipe, root: Path) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Counts, and the texts on each side."""
    files = [(source, file) for source in recipe.data.sources for file in list_files(source)]
    (root / "work").mkdir()
    counts = clean_corpus(recipe.data, files, root / "work", root / "documents")
    sides: dict[str, set[str]] = {"train": set(), "validation": set()}
    for path in (root / "documents").rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            sides[path.relative_to(root / "documents").parts[0]].add(json.loads(line)["text"])
    return counts, sides


def test_normalize_repairs_mojibake_and_leaves_the_rest() -> None:
    assert normalize("cafÃ© is good") == "café is good"
    assert normalize("a\r\nb\rc\n") == "a\nb\nc\n"
    assert normalize("a\x00b\x1b[1;31mc") == normalize("a\x00b\x1b[1;31m\ufeffc") == "abc"
    kept = "def f(x):\n\treturn “x” + 'ﬁ' + '你好，世界' + '&lt;'\n"
    assert normalize(kept) == kept


@given(st.text())
def test_normalized_text_stays_the_same_and_encodes(text: str) -> None:
    once = normalize(text)
    assert "\r" not in once
    assert "\0" not in once
    if once.isascii():
        assert normalize(once) == once


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("short", "too short"),
        ("word " * 50_000, "too long"),
        ("x1 " * 4000, "lines too long"),
        ("-=-=-=+*/ " * 30 + "\n", "too few letters and digits"),
        ("buy this now, it is very cheap\n" * 20, "repeated lines"),
        (sentence(1) + "\n", None),
        (C_CODE, None),
        (
            "今天天气很好，我们一起去公园散步。" * 2 + "\n他说：“明天见！”然后就走了，再也没有回来。",
            None,
        ),
    ],
)
def test_reasons_to_drop(text: str, reason: str | None) -> None:
    config = CleaningConfig(max_characters=100_000, min_characters=40, max_repeated_line_fraction=0.7)
    assert reason_to_drop(text, config) == reason


def test_near_duplicates_leave_one(tmp_path: Path) -> None:
    long = sentence(1, 400)
    near = long.replace("alpha", "ALPHA", 1) + " And a last word."
    chinese = "".join(chr(0x4E00 + (n * n * 7919) % 5000) for n in range(300))
    texts = [long, near, long, sentence(2, 400), chinese, chinese + "完", "a short one, twice", "a short one, twice"]
    recipe = make_recipe(
        [{"name": "s", "path": str(write_jsonl(tmp_path / "a.jsonl", texts))}],
        data={"validation_fraction": 0.0, "cleaning": {"min_characters": 5}},
    )
    counts, sides = clean(recipe, tmp_path)
    assert counts == {"read": 8, "kept": 4, "duplicate": 4}
    assert len(sides["train"] & {long, near}) == 1
    assert {sentence(2, 400), "a short one, twice"} <= sides["train"]


def test_tasks_in_processes_and_several_sources(tmp_path: Path) -> None:
    """Files spread over more tasks than have work, in two processes; duplicates are found across sources."""
    write_jsonl(tmp_path / "one" / "a.jsonl", [sentence(n) for n in range(20)])
    write_jsonl(tmp_path / "two" / "b.jsonl", [sentence(n) for n in range(15, 30)])
    recipe = make_recipe(
        [{"name": name, "path": str(tmp_path / name)} for name in ("one", "two")],
        data={"workers": 2, "executor": {"tasks": 3}},
    )
    counts, sides = clean(recipe, tmp_path)
    assert counts == {"read": 35, "kept": 30, "duplicate": 5}
    assert sides["train"] | sides["validation"] == {sentence(n) for n in range(30)}
    assert not sides["train"] & sides["validation"]


def test_everything_off_keeps_every_document(tmp_path: Path) -> None:
    texts = ["x", "x", "y\r\n"]
    recipe = make_recipe(
        [{"name": "s", "path": str(write_jsonl(tmp_path / "a.jsonl", texts))}],
        data={"validation_fraction": 0.0, "cleaning": {"enabled": False}, "dedup": {"enabled": False}},
    )
    counts, sides = clean(recipe, tmp_path)
    assert counts == {"read": 3, "kept": 3}
    assert sides["train"] == set(texts)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_line_is_named_from_every_process(tmp_path: Path, workers: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [sentence(1)])
    path.write_text(path.read_text() + "{broken\n")
    recipe = make_recipe([{"name": "s", "path": str(path)}], data={"workers": workers, "executor": {"tasks": workers}})
    with pytest.raises(InputError, match="line 2 is not valid JSON") as error:
        clean(recipe, tmp_path)
    assert error.value.where == str(path)


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [sentence(1, 100), sentence(1, 100)])
    clean(make_recipe([{"name": "s", "path": str(path)}]), tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_killed_cleaning_leaves_no_process_behind_and_continues(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    for n in range(4):
        write_jsonl(source / f"{n}.jsonl", [sentence(n * 1000 + i, 200) for i in range(150)])
    script = tmp_path / "clean.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    from pathlib import Path\n"
        "    from tiny_corpus import make_recipe\n"
        "    from anychip.data.prepare import prepare_data\n"
        "    from anychip.rundir import RunDirectory\n"
        "    data = {'workers': 2, 'executor': {'tasks': 4}}\n"
        "    recipe = make_recipe([{'name': 's', 'path': sys.argv[2]}], data=data)\n"
        "    prepare_data(recipe, RunDirectory(Path(sys.argv[3])))\n"
    )

    def start(run: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(Path(__file__).parent), str(source), str(run)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)

    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").rglob("work/logs/read/completions/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert start(tmp_path / "whole").wait() == 0
    for name in ("train/s.bin", "train/s.idx", "validation/s.bin", "tokenizer/tokenizer.json", "summary.json"):
        assert (tmp_path / "killed/data" / name).read_bytes() == (tmp_path / "whole/data" / name).read_bytes()
    members = subprocess.run(["pgrep", "-g", str(killed.pid)], capture_output=True, text=True, check=False).stdout
    assert members == "", "the killed run's workers must not survive it"


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ({"kind": "slurm"}, "slurm_partition is missing"),
        ({"kind": "slurm", "slurm_partition": "cpu"}, "there is no sbatch here"),
        ({"kind": "ray"}, "ray is not installed"),
    ],
)
def test_clusters_that_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "ray", None)
    path = write_jsonl(tmp_path / "a.jsonl", [sentence(1)])
    with pytest.raises(InputError, match=message):
        clean(make_recipe([{"name": "s", "path": str(path)}], data={"executor": executor}), tmp_path)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for Slurm's commands that runs an array's tasks at once, on this machine; `data` of a recipe."""
    tools = tmp_path / "bin"
    tools.mkdir()
    sbatch = tools / "sbatch"
    sbatch.write_text(
        f"#!{sys.executable}\n"
        "import os, re, subprocess, sys\n"
        "script = sys.argv[-1]\n"
        "last = int(re.search(r'--array=0-(\\d+)', open(script).read()).group(1))\n"
        "for task in range(last + 1):\n"
        "    subprocess.run(['bash', script], stdout=subprocess.DEVNULL,\n"
        "                   env={**os.environ, 'SLURM_ARRAY_TASK_ID': str(task), 'SLURM_NODELIST': 'here'})\n"
        "print('Submitted batch job 7')\n"
    )
    srun = tools / "srun"
    srun.write_text('#!/bin/bash\nwhile [[ "$1" != launch_pickled_pipeline ]]; do shift; done\nexec "$@"\n')
    scontrol = tools / "scontrol"
    scontrol.write_text("#!/bin/bash\necho here\n")
    squeue = tools / "squeue"
    squeue.write_text("#!/bin/bash\n")
    for tool in (sbatch, srun, scontrol, squeue):
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    executor = {"kind": "slurm", "slurm_partition": "cpu", "tasks": 1}
    return {"executor": executor, "validation_fraction": 0.0, "dedup": {"enabled": False}}


def test_slurm_jobs_do_the_same_work(tmp_path: Path, slurm: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [sentence(n) for n in (1, 2, 2)])
    counts, sides = clean(make_recipe([{"name": "s", "path": str(path)}], data=slurm), tmp_path)
    assert counts == {"read": 3, "kept": 3}
    assert sides["train"] == {sentence(1), sentence(2)}


def test_failed_slurm_tasks_are_not_waited_for(tmp_path: Path, slurm: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n")
    with pytest.raises(AnychipError, match="1 tasks of the stage read failed") as error:
        clean(make_recipe([{"name": "s", "path": str(path)}], data=slurm), tmp_path)
    assert (Path(error.value.where) / "logs").is_dir()


def test_split_depends_on_the_text_alone() -> None:
    sides = [side(sentence(n), 0.2) for n in range(500)]
    assert sides == [side(sentence(n), 0.2) for n in range(500)]
    assert 60 < sides.count("validation") < 140
    held_out = {n for n in range(500) if side(sentence(n), 0.1) == "validation"}
    assert held_out <= {n for n, where in enumerate(sides) if where == "validation"}
    assert {side(sentence(n), 0.0) for n in range(500)} == {"train"}


def test_small_corpus_still_holds_one_out(tmp_path: Path) -> None:
    train, validation = tmp_path / "train", tmp_path / "validation"
    path = write_jsonl(train / "00000.jsonl", [sentence(n) for n in range(5)])
    before = path.read_bytes().splitlines()
    hold_one_out(train, validation)
    moved = (validation / "moved.jsonl").read_bytes().splitlines()
    assert len(moved) == 1
    assert sorted(path.read_bytes().splitlines() + moved) == sorted(before)
    path.write_bytes(b"\n".join(before) + b"\n")  # as if killed before the document left its old place
    hold_one_out(train, validation)
    assert sorted(path.read_bytes().splitlines() + moved) == sorted(before)
