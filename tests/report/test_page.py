"""The page holds its sections, says what is missing, and never lets foreign text become markup."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from anychip.errors import InputError
from anychip.recipe import Recipe, parse_recipe
from anychip.report import write_report
from anychip.rundir import RunDirectory

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"
SECTIONS = ["What it says", "Held-out text", "Learning", "Speed", "Supervised tuning", "Data", "Model", "Recipe"]


def recipe(path: str = "python:stdlib") -> Recipe:
    return parse_recipe(
        {
            "schema_version": 1,
            "name": "small",
            "model": {
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            "data": {"sources": [{"name": "text", "path": path}]},
            "training": {"steps": 100, "seq_length": 64},
            "tune": {"sft": {"dataset": path}},
        },
        "test",
    )


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def rows(steps: int) -> str:
    lines = []
    for step in range(1, steps + 1):
        values = {"loss": 8.0 / step, "grad_norm": 1.0 / step, "lr": 1e-3, "tokens_per_second": 1000.0 + step}
        lines.append({"step": step, **values, "tokens": step * 512, "mfu": 0.4, "memory_bytes": 2**30, "tflops": 0.1})
        if step % 10 == 0:
            lines.append({"step": step, "validation_loss": 8.2 / step, "validation_bits_per_byte": 2.0 / step})
    return "\n".join(json.dumps(line) for line in lines)


def complete_run(root: Path, text: str = "plain") -> RunDirectory:
    run = RunDirectory(root)
    run.write_recipe(recipe(text))
    write(run.logs / "metrics.jsonl", rows(50))
    write(run.sft / "logs" / "metrics.jsonl", rows(20))
    evaluation = {
        "held_out": {"tokens": 1000, "utf8_bytes": 3000, "sha256": text},
        "model": {"bits_per_byte": 1.25},
        "xz": {"cold": 2.0, "primed": 1.5, "primed_with_bytes": 9000},
        "ngram": {"bits_per_byte": 1.75, "order": 5, "training_tokens": 3000},
    }
    write(run.evaluation, json.dumps(evaluation))
    sample = {"question": text, "answer": text, "reference": text, "novelty": "trained"}
    write(run.root / "samples.json", json.dumps({"samples": [sample], "sampling": {"temperature": 0}}))
    counts = {"documents": 30, "tokens": 4000, "text_bytes": 12_000, "bin_sha256": text}
    summary = {
        "documents": {"read": 50, "kept": 31, "duplicate": 12, text: 7},
        "sources": {text: {"train": counts, "validation": {"documents": 1, "tokens": 99}}, "packed": {"tokens": 5}},
        "tokenizer": {"digest": text, "vocab_size": 512},
    }
    write(run.data / "summary.json", json.dumps(summary))
    run.finish("data", {"seconds": 3.0})
    run.finish("train", {"seconds": 60.0})
    return run


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside of style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_a_complete_run_fills_its_sections(tmp_path: Path) -> None:
    page = Page(write_report(complete_run(tmp_path)))
    assert page.count("h2") == len(SECTIONS) and all(section in page.text for section in SECTIONS)
    assert page.count("svg") == 9
    for words in (
        "1.250",
        "1.750",
        "xz -9e, primed",
        "−17%",
        "学习过程",
        "1 m 03 s",
        "seen in tuning",
        "11.7 KiB",
        "12 documents",
    ):
        assert words in page.text


def test_nothing_foreign_becomes_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    page = Page(write_report(complete_run(tmp_path, HOSTILE)))
    assert page.text.count("<script>alert(1)</script>") >= 4
    assert not page.count("script") and not page.count("img") and not page.count("link") and not page.count("iframe")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]


def test_every_missing_input_is_said(tmp_path: Path) -> None:
    page = Page(write_report(RunDirectory(tmp_path)))
    assert page.text.count("left out:") == 9
    assert "samples.json" in page.text and page.count("svg") == 0
    with pytest.raises(InputError, match="not a run directory"):
        write_report(RunDirectory(tmp_path / "absent"))


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "{",
        "[]",
        "null",
        '{"samples": 3}',
        '{"model": [1]}',
        "[" * 50_000,
        '{"step": 1}',
        '{"step": 1, "loss": NaN}',
    ],
)
def test_broken_inputs_cost_their_own_section_only(tmp_path: Path, junk: str) -> None:
    run = complete_run(tmp_path)
    places = [run.evaluation, run.root / "samples.json", run.data / "summary.json", run.logs / "metrics.jsonl"]
    for path in [*places, run.stage_marker("data"), run.sft / "logs" / "metrics.jsonl"]:
        write(path, junk)
    page = Page(write_report(run))
    assert page.count("h2") == len(SECTIONS) and "left out:" in page.text and "512 pieces" in page.text


def test_a_torn_line_and_a_resumed_step_do_not_spoil_the_curves(tmp_path: Path) -> None:
    run = complete_run(tmp_path)
    path = run.logs / "metrics.jsonl"
    write(path, rows(50) + "\n" + rows(12) + '\n{"step": 51, "lo')
    page = Page(write_report(run))
    assert "25.6k" in page.text and page.count("svg") == 9


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_opens_in_a_browser_in_light_and_dark(tmp_path: Path) -> None:
    path = write_report(complete_run(tmp_path / "run"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    pictures = []
    for scheme in ("0", "1"):
        picture = tmp_path / f"{scheme}.png"
        arguments = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=900,1200"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        subprocess.run(
            [*command, *arguments, profile, f"--screenshot={picture}", path.as_uri()],
            check=True,
            capture_output=True,
            timeout=60,
        )
        pictures.append(picture.read_bytes())
    assert all(len(picture) > 20_000 for picture in pictures) and pictures[0] != pictures[1]
