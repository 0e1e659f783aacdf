"""The page of a plan: every part is there, hostile names stay text, a browser draws it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from anychip.plan.answer import PlanAnswer, answer_plan
from anychip.plan.machine import machine_of_chip
from anychip.plan.sites import default_site, trained_here
from anychip.plan.types import Layout, Workload
from anychip.recipe.cluster import FailureConfig
from anychip.report.plan_page import render, write_plan_page

WORKLOAD = Workload("small", 24, 2048, 5632, 16, 8, 128, 32_000, 4096, 256, biases="telechat2")
FAILURES = FailureConfig(per_1000_node_days=5, restart_seconds=300, checkpoint_stall_seconds=5)


def answer(layout: Layout | None = None, failures: FailureConfig = FAILURES) -> PlanAnswer:
    machine = machine_of_chip("ascend-910b3", 64)
    return answer_plan(WORKLOAD, machine, default_site("ascend-910b3"), 1e11, layout, failures)


def test_every_part_is_there() -> None:
    page = render(answer(Layout(dp=8, tp=2, pp=4, micro_batch=1)))
    for heading in ("Layouts", "Where the time goes", "Memory of each stage", "The pipeline", "More or fewer devices"):
        assert f"<h2>{heading}" in page, heading
    assert "stage 3" in page and "pass-backward" in page and "work done again" in page
    assert "http://" not in page and "https://" not in page


def test_without_pipeline_or_failures_their_parts_are_left_out() -> None:
    page = render(answer(Layout(dp=64, zero=3), FailureConfig()))
    assert "<h2>The pipeline" not in page and "Failures are off" in page


def test_a_layout_that_does_not_fit_says_so() -> None:
    big = replace(WORKLOAD, layers=96, hidden=8192, ffn=32_768, heads=64, global_batch=64)
    machine = machine_of_chip("ascend-910b3", 64)
    page = render(answer_plan(big, machine, default_site("ascend-910b3"), 1e11, Layout(dp=64, zero=1)))
    assert "does not fit" in page and "GiB over" in page


def test_each_rejected_layout_is_there_with_its_reason() -> None:
    machine = machine_of_chip("ascend-910b3", 64)
    big = replace(WORKLOAD, layers=48, hidden=8192, ffn=24_576, heads=64, global_batch=256)
    found = answer_plan(big, machine, trained_here(default_site("ascend-910b3")), 1e11)
    page = render(found)
    assert "TP 16 crosses nodes" in page and "tp16 pp8 cp1" in page and "nearest to fitting" in page
    assert len(re.findall(r"stage \d+ is [\d.]+ GiB over", page)) >= found.search.rejected.counts()["over memory"]  # type: ignore[attr-defined]
    assert "--set parallel.tensor_parallel=" in page


def test_a_layout_that_search_leaves_out_says_so() -> None:
    machine, site = machine_of_chip("ascend-910b3", 64), trained_here(default_site("ascend-910b3"))
    page = render(answer_plan(WORKLOAD, machine, site, 1e11, Layout(dp=16, pp=4, zero=3)))
    assert "The search leaves this layout out" in page and "--set" not in page


def test_hostile_names_stay_text() -> None:
    found = answer(Layout(dp=64, zero=3))
    hostile = replace(found, workload=replace(found.workload, name="<script>alert(1)</script>"), notes=("<b>&",))
    page = render(hostile)
    assert "<script" not in page and "<b>&" not in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    path, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    write_plan_page(answer(Layout(dp=8, tp=2, pp=4, micro_batch=1)), path)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,2400", f"--screenshot={picture}"]
    subprocess.run([*command, path.as_uri()], check=True, capture_output=True, timeout=60)
    assert picture.stat().st_size > 60_000
