"""What the pages say can be typed is typed here, as it stands, on the demo recipe made small.

`.venv/bin/anychip` and `.venv/bin/torchrun` are stand-ins that add overrides to every command with a recipe. Nothing
else differs from what a reader does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import ROOT, blocks, pages

SMALL = {
    "model.vocab_size": "1024",
    "model.hidden_size": "96",
    "model.intermediate_size": "128",
    "model.num_hidden_layers": "1",
    "data.tokenizer.vocab_size": "1024",
    "data.sources.0.include": '["s*.py", "t*.py", "builtin*"]',
    "data.executor.tasks": "1",
    "data.workers": "1",
    "training.seq_length": "64",
    "training.steps": "4",
    "grow": "[{at_tokens: 1024, to: {num_hidden_layers: 2}}]",
    "training.eval_interval": "0",
    "training.eval_tokens": "2048",
    "tune.sft.subjects": "[str]",
    "tune.sft.steps": "2",
    "tune.sft.micro_batch_size": "4",
    "tune.sft.global_batch_size": "4",
    "tune.grpo.steps": "2",
    "tune.grpo.group_size": "2",
    "tune.grpo.global_batch_size": "4",
    "tune.grpo.micro_batch_size": "2",
    "tune.grpo.held_out_questions": "4",
    "eval.max_tokens": "4096",
    "serve.sampling.max_new_tokens": "8",
}

STAND_IN = """#!{python}
import os, sys
words = sys.argv[1:]
if any(word.endswith(("demo.yaml", "laptop.yaml")) for word in words):
    words += {overrides!r}
os.execv({python!r}, [{python!r}, "-m", {module!r}, *words])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a clone after ./demo.sh has installed everything and not yet run."""
    for name in ("recipes", "clusters"):
        shutil.copytree(ROOT / name, tmp_path / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    overrides = [word for field, value in SMALL.items() for word in ("--set", f"{field}={value}")]
    for program, module in (("anychip", "anychip"), ("torchrun", "torch.distributed.run")):
        path = programs / program
        path.write_text(STAND_IN.format(python=sys.executable, overrides=overrides, module=module), encoding="utf-8")
        path.chmod(0o755)
    return tmp_path


def run_page(page: Path, folder: Path) -> str:
    """Run the page's ```bash run blocks one after another; returns what they print."""
    printed = []
    for block in blocks(page):
        if block.runs:
            done = subprocess.run(
                ["bash", "-exo", "pipefail", "-c", block.text],
                cwd=folder, input="What does str.upper do?\n", capture_output=True, text=True, timeout=280, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{page.name}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
            printed.append(done.stdout)
    return "".join(printed)


def test_the_quick_start_works(folder: Path) -> None:
    _, quickstart, *_ = pages("en")
    assert quickstart.name == "quickstart.md"
    printed = run_page(quickstart, folder)
    assert "step 4/4 | loss" in printed and "train: done before" in printed and "step 3 learned from" in printed
    run = folder / "runs" / "demo"
    for left in ("recipe.yaml", "logs/metrics.jsonl", "eval.json", "samples.json", "export/config.json", "report.html"):
        assert (run / left).is_file(), left


@pytest.mark.slow
def test_every_page_works_in_the_order_of_the_readme(folder: Path) -> None:
    for page in pages("en"):
        run_page(page, folder)
    assert {"demo", "two", "imported", "untrained"} <= {run.name for run in (folder / "runs").iterdir()}
    assert len((folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 2
