"""Fitting: known scalars are found again, a few runs do not overrule the prior, and held-out errors are honest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan.published import b200, table_1, write_runs, write_vtrain

from anychip.errors import InputError
from anychip.plan.calibrate import (
    KNOBS,
    MODERN_KNOBS,
    OLD_KNOBS,
    Sample,
    calibrate,
    fit_site,
    knobs_for,
    predict_runs,
)  # fmt: skip
from anychip.plan.rows import Run, read_rows
from anychip.plan.sites import default_site, load_site, read_site, shipped_sites, write_site

OLD = load_site("a100/megatron-2021")


def vtrain(tmp_path: Path) -> list[Run]:
    return read_rows(write_vtrain(tmp_path / "vtrain.csv"))[0]


def pretend(runs: list[Run], site: str, **changes: float) -> list[Run]:
    """Runs whose times are what a changed site would give."""
    truth = replace(load_site(site), **changes)  # type: ignore[arg-type]
    seconds = predict_runs(runs, lambda _: truth)
    return [replace(run, seconds=float(value)) for run, value in zip(runs, seconds, strict=True)]


def test_a_known_site_is_found_again(tmp_path: Path) -> None:
    runs = pretend(vtrain(tmp_path) * 12, OLD.name, matmul_efficiency=0.6, intra_node_efficiency=0.6)
    found = fit_site(Sample.of(runs), OLD, OLD_KNOBS)
    assert found.matmul_efficiency == pytest.approx(0.6, rel=0.05)
    assert found.intra_node_efficiency < OLD.intra_node_efficiency
    for run, seconds in zip(runs, predict_runs(runs, lambda _: found), strict=True):
        assert seconds == pytest.approx(run.seconds, rel=0.06)


def test_one_run_moves_the_prior_only_a_little(tmp_path: Path) -> None:
    runs = pretend(vtrain(tmp_path)[:1], OLD.name, matmul_efficiency=0.3)
    found = fit_site(Sample.of(runs), OLD, OLD_KNOBS)
    assert 0.45 < found.matmul_efficiency < OLD.matmul_efficiency


def test_calibration_reports_held_out_errors(tmp_path: Path) -> None:
    runs = pretend(vtrain(tmp_path) * 3, OLD.name, matmul_efficiency=0.6)
    result = calibrate(runs, OLD, "ours")
    assert result.held_out_by == "model"
    assert result.held_out is not None
    assert result.fitted <= result.held_out < result.before
    assert result.site.name == "ours"
    assert result.site.relative_sigma >= 0.02
    assert "27 runs of 4 models" in result.site.source


def test_calibration_without_times_is_bad_input(tmp_path: Path) -> None:
    runs = [replace(run, seconds=None) for run in vtrain(tmp_path)]
    with pytest.raises(InputError, match="no run has a measured time"):
        calibrate(runs, OLD, "ours")


def test_at_most_ten_scalars_and_only_those_that_runs_speak_of(tmp_path: Path) -> None:
    assert len(MODERN_KNOBS) <= 10
    modern = knobs_for(read_rows(write_runs(tmp_path / "b200.csv", b200()))[0])
    assert "expert_efficiency" not in modern
    assert "low_precision_efficiency" not in modern
    assert knobs_for(read_rows(write_runs(tmp_path / "t1.csv", table_1()))[0]) == OLD_KNOBS


@pytest.mark.parametrize("knob", KNOBS.values(), ids=lambda knob: knob.name)
def test_knobs_keep_their_range(knob: object) -> None:
    for position in (-40.0, 0.0, 40.0):
        assert knob.low <= knob.decode(position) <= knob.high  # type: ignore[attr-defined]
    middle = knob.decode(0.3)  # type: ignore[attr-defined]
    assert knob.decode(knob.encode(middle)) == pytest.approx(middle)  # type: ignore[attr-defined]


def test_site_files_survive_writing(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    write_site(replace(OLD, name="ours", matmul_efficiency=0.61), path)
    assert read_site(path).matmul_efficiency == 0.61
    assert read_site(path).fused_attention is False


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("memory_efficiency: -0.5", "memory_efficiency is -0.5; it cannot be negative"),
        ("memory_efficiency: 1.5", "share of the peak"),
        ("memory_efficiency: fast", "'fast'"),
        ("memory_eficiency: 0.5", "unknown fields memory_eficiency"),
        ("fused_attention: 3", "fused_attention is 3"),
    ],
)
def test_wrong_site_files_are_refused(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"name: x\n{line}\n")
    with pytest.raises(InputError, match=complaint):
        read_site(path)


def test_shipped_sites_say_how_they_came_about() -> None:
    sites = shipped_sites().sites
    assert {"ascend-910b/mindspeed", "ascend-910b/mindformers", "a100/megatron-2021", "all/modern/all"} <= set(sites)
    assert all(site.source and site.relative_sigma >= 0.03 for site in sites.values())


def test_every_chip_has_a_site() -> None:
    assert default_site("ascend-910b3").name == "ascend-910b/mindformers"
    assert default_site("ascend-910c-die", "mindspeed").name == "ascend-910b/mindspeed"
    assert default_site("metax-c500").name == "all/modern/all"
    with pytest.raises(InputError, match="is no site"):
        load_site("nowhere")
