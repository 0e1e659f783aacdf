"""What `anychip plan` says: searches, single layouts, what-if questions, refusals, tables and JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from anychip.cli import main
from anychip.errors import InputError, UnfitError
from anychip.plan.answer import answer_plan, as_json
from anychip.plan.layouts import layout_of, overrides_of, parse_layout
from anychip.plan.machine import machine_of_chip, machines_of
from anychip.plan.models import tokens_of
from anychip.plan.question import changed_cluster, cluster_of, with_seq_length
from anychip.plan.shapes import workload_of
from anychip.plan.sites import default_site
from anychip.plan.text import counted, days_text
from anychip.plan.types import Layout
from anychip.recipe import Recipe, load_recipe
from anychip.recipe.cluster import FailureConfig, load_cluster

ROOT = Path(__file__).parents[2]
LARGE = ROOT / "recipes" / "telechat2-115b.yaml"
MIXED = str(ROOT / "clusters" / "mixed-910b-mlu590.yaml")
CLUSTERS = sorted((ROOT / "clusters").glob("*.yaml"))


def recipe(*overrides: str) -> Recipe:
    return load_recipe(LARGE, list(overrides))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["anychip", *words])
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_example_clusters_are_read(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.name == path.stem
    if path.stem != "this-cpu":  # planned from its measurement
        assert all(machine.devices >= 256 for machine in machines_of(cluster))


def test_the_published_layout_is_near_the_published_rate() -> None:
    """157 tokens/s of one device (dp 8, tp 8, pp 8, VPP 3, 8 micro-batches of 8,192 tokens): the interval holds it."""
    wanted = recipe("training.global_batch_size=64")
    layout = parse_layout("dp8 tp8 pp8 vpp3 mbs1 zero1", workload_of(wanted), 512)
    machine, site = machine_of_chip("ascend-910b3", 512), default_site("ascend-910b3")
    found = answer_plan(workload_of(wanted), machine, site, 1e13, layout).chosen
    fastest, slowest = (64 * 8192 / 512 / seconds for seconds in found.interval)
    assert slowest < 157 < fastest
    assert found.tokens_per_second_per_device == pytest.approx(157, rel=0.12)
    assert found.fits


def test_a_search_prefers_what_is_left_after_failures() -> None:
    machine, site = machine_of_chip("ascend-910b3", 8192), default_site("ascend-910b3")
    failures = FailureConfig(per_1000_node_days=4, restart_seconds=600, checkpoint_stall_seconds=5)
    found = answer_plan(workload_of(recipe()), machine, site, 1e13, failures=failures)
    assert len(found.search.best) == 10 and found.chosen.fits
    assert found.goodput.effective < 1 and found.goodput.days > found.days
    values = json.loads(json.dumps(as_json(found)))
    assert values["rejected"]["over memory"] > 0
    each = values["rejected_layouts"]
    assert len(each) == sum(values["rejected"].values()) == len(found.search.rejected)
    assert {"layout": "tp16 pp8 cp1", "reason": "TP 16 crosses nodes"} in each
    over = [one for one in each if one["reason"].endswith("GiB over")]
    assert len(over) == values["rejected"]["over memory"] and all("recompute-" in one["layout"] for one in over)
    assert values["goodput"]["days_interval"][0] < values["goodput"]["days"] < values["goodput"]["days_interval"][1]


def test_what_fits_nowhere_is_refused_with_the_nearest() -> None:
    machine = machine_of_chip("ascend-910b3", 8)
    with pytest.raises(UnfitError, match=r"is nearest, stage \d+ is [\d.]+ GiB over"):
        answer_plan(workload_of(recipe("training.global_batch_size=8")), machine, default_site("ascend-910b3"), 1e12)


def test_layouts_of_recipes_and_back() -> None:
    words = ["parallel.tensor_parallel=8", "parallel.pipeline_parallel=8", "parallel.virtual_pipeline=3",
             "parallel.pipeline_schedule=interleaved", "parallel.data_parallel_shard=16"]  # fmt: skip
    layout = layout_of(recipe(*words), 8192)
    assert (layout.dp, layout.tp, layout.pp, layout.vpp, layout.zero, layout.shard) == (128, 8, 8, 3, 1, 16)
    assert layout_of(recipe(*overrides_of(layout)), 8192) == layout
    with pytest.raises(InputError, match="needs 1024 devices"):
        layout_of(recipe(*words), 100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp8 pp8 vpp3", Layout(dp=2, tp=8, pp=8, vpp=3, schedule="interleaved")),
        ("dp16,tp8", Layout(dp=16, tp=8, zero=3)),
        ("tp4 pp4 dualpipe_v recompute-full zero2", Layout(dp=8, tp=4, pp=4, vpp=2, schedule="dualpipe_v",
                                                           recompute="full", zero=2)),
        ("tp8 pp2 layers50-46", Layout(dp=8, tp=8, pp=2, stage_layers=(50, 46))),
    ],
)  # fmt: skip
def test_layouts_in_words(text: str, expected: Layout) -> None:
    assert parse_layout(text, workload_of(recipe()), 128) == expected


@pytest.mark.parametrize("text", ["tp", "tp0", "dp3 tp8", "fast", "zero9", "layers", "tp8 pp2 layers50-45", "tp-8"])
def test_words_that_are_no_layout_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_layout(text, workload_of(recipe()), 128)


def test_printed_layouts_are_read_again() -> None:
    layout = Layout(dp=4, tp=8, pp=4, vpp=2, schedule="interleaved", micro_batch=2, recompute="full", zero=1)
    assert parse_layout(str(layout), workload_of(recipe()), 128) == layout


def test_what_if_questions() -> None:
    cluster = load_cluster(ROOT / "clusters" / "ascend-910b-8192.yaml")
    assert machines_of(changed_cluster(cluster, None, 512))[0].devices == 512
    other = changed_cluster(cluster, "a100-80g", None)
    assert machines_of(other)[0].chip == "a100-80g" and machines_of(other)[0].devices == 8192
    assert other.failures == cluster.failures
    longer = with_seq_length(workload_of(recipe()), 32_768)
    assert longer.tokens == workload_of(recipe()).tokens
    for call in (
        lambda: changed_cluster(cluster, None, 12),
        lambda: cluster_of("ascend-910b3", 12),
        lambda: with_seq_length(workload_of(recipe()), 1000),
        lambda: changed_cluster(load_cluster(ROOT / "clusters" / "mixed-910b-910c.yaml"), None, 8),
    ):
        with pytest.raises(InputError):
            call()


def test_the_verb_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", str(LARGE), "--cluster", str(ROOT / "clusters/ascend-910b-8192.yaml"))
    assert code == 0
    assert re.search(r"^ 1  dp\d+ tp8 .* s +\d+ +\d+\.\d%", out, re.MULTILINE)
    assert "to train with it: --set parallel.data_parallel_replicate=" in out and "TP 16 crosses nodes" in out
    near = out.split("nearest to fitting:\n")[1].splitlines()
    assert all(re.fullmatch(r"  dp\d+ .*: stage \d+ is [\d.]+ GiB over", line) for line in near[:5]) and not any(
        near[5:6]
    )
    assert "MWh" not in out  # nobody has published this chip's power


def test_the_verb_plans_a_mixed_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    small = str(ROOT / "recipes" / "telechat2-35b.yaml")
    code, out, _ = run(capsys, "plan", small, "--cluster", str(ROOT / "clusters/mixed-910b-mlu590.yaml"), "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0 and found["gain"] > 1
    assert set(found["best"][0]["groups"]) == {"ascend-910b", "mlu590"}
    assert sum(found["best"][0]["stage_layers"]) == 64


def test_the_verb_explains_one_layout(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "explain", str(LARGE), "tp8 pp8 vpp3", "--chip", "ascend-910b3", "--devices", "4096"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.startswith("layout dp64 tp8 pp8 vpp3") and "activations" in out
    code, out, _ = run(capsys, *words, "--json")
    values = json.loads(out)
    assert sum(values["time"].values()) == pytest.approx(values["step_seconds"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(LARGE)], "nothing to plan on"),
        ([str(LARGE), "--chip", "nochip", "--devices", "8"], "is not a chip of the catalogue"),
        ([str(LARGE), "--chip", "ascend-910b3", "--devices", "-8"], "--devices is -8"),
        ([str(LARGE), "--chip", "ascend-910b3", "--devices", "8192", "--site", "nowhere"], "is no site"),
        (["validate", "--runs", "missing.csv"], "there is no such file"),
        ([str(LARGE), "--cluster", MIXED, "--fixed"], "are for one kind of chips"),
        ([str(LARGE), "--cluster", MIXED, "--site", "a100/fsdp"], "--site names one"),
        (["explain", str(LARGE), "tp8", "--cluster", MIXED], "explained on one kind of chips"),
    ],
)
def test_mistakes_get_a_paragraph(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = run(capsys, "plan", *words)
    assert code == 2 and message in err and not out


@pytest.mark.parametrize("words", ["10T", "1e13", "10_000_000_000_000", "10000b"])
def test_tokens_as_people_write_them(words: str) -> None:
    assert tokens_of(words) == 1e13


@pytest.mark.parametrize("words", ["nan", "inf", "-5", "0", "many", "", "T", "-2B", "1e999"])
def test_tokens_that_are_no_number_are_refused(capsys: pytest.CaptureFixture[str], words: str) -> None:
    code, out, err = run(capsys, "plan", str(LARGE), "--chip", "ascend-910b3", "--devices", "4096", f"--tokens={words}")
    assert code == 2 and "--tokens is" in err and "10T" in err and not out


def test_one_is_not_many_and_short_jobs_have_figures() -> None:
    assert [counted(count, "run") for count in (0, 1, 2000)] == ["0 runs", "1 run", "2,000 runs"]
    assert [days_text(days) for days in (0.0, 0.00123, 0.5, 1234.56)] == ["0.0", "0.0012", "0.5", "1,234.6"]


def test_folders_of_written_files_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "folder" / "plan.html"
    words = ["plan", str(LARGE), "--chip", "ascend-910b3", "--devices", "1024", "--fixed", "--html", str(page)]
    settings = ["parallel.tensor_parallel=8", "parallel.pipeline_parallel=16", "training.recompute=full"]
    code, _, err = run(capsys, *words, *(word for setting in settings for word in ("--set", setting)))
    assert code == 0, err
    assert page.exists()


def test_a_negative_bandwidth_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\ngroups: [{name: a, chip: ascend-910b3, nodes: 2, intra_node_gb_per_s: -5}]\n")
    code, _, err = run(capsys, "plan", str(LARGE), "--cluster", str(path))
    assert code == 2 and "intra_node_gb_per_s" in err


def test_validate_and_calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from published import table_1, write_runs

    runs, site = write_runs(tmp_path / "runs.csv", table_1()), tmp_path / "mine.yaml"
    code, out, _ = run(capsys, "plan", "validate", "--runs", str(runs), "--json", str(tmp_path / "out.json"))
    assert code == 0 and "baseline" in out and json.loads((tmp_path / "out.json").read_text())["rows"]
    code, out, _ = run(capsys, "plan", "calibrate", "--runs", str(runs), "--out", str(site))
    assert code == 0 and "held out by" in out
    code, out, _ = run(capsys, "plan", "validate", "--runs", str(runs), "--site", str(site))
    assert code == 0
