"""Fitting: known scalars are found again, a few runs do not overrule the prior, and held-out errors are honest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plan.published import b200, table_1, write_runs, write_vtrain
from typer.testing import CliRunner

from anychip.cli import app
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
from anychip.plan.gemm import product_seconds
from anychip.plan.machine import machine_of_chip
from anychip.plan.measured_products import with_measured_products
from anychip.plan.rows import Run, read_rows
from anychip.plan.sites import default_site, foreign_site, load_site, read_site, shipped_sites, write_site
from anychip.plan.table import hardware_of
from anychip.plan.text import calibration_as_text
from anychip.plan.types import Site

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


# --- a team's own site ------------------------------------------------------------------------------------------


def slowed(runs: list[Run], factor: float) -> list[Run]:
    return [replace(run, seconds=run.seconds * factor) for run in runs if run.seconds]


@pytest.mark.parametrize("factor", [1.0, 1.2, 1.5, 2.0, 3.0])
def test_a_site_that_is_slower_throughout_is_followed(tmp_path: Path, factor: float) -> None:
    """A shift that all runs share is what a team's site is for, and no outlier."""
    runs = read_rows(write_runs(tmp_path / "t1.csv", table_1()))[0]
    result = calibrate(slowed(runs, factor), OLD, "slow")
    assert result.fitted <= 0.06
    assert result.held_out is not None and result.held_out <= 0.08
    assert result.inside is not None and result.inside >= 7


def test_repetitions_of_one_run_cannot_be_held_out(tmp_path: Path) -> None:
    run = vtrain(tmp_path)[0]
    result = calibrate([run, replace(run, seconds=3.6)], OLD, "twice")
    assert result.held_out is None and result.inside is None
    assert result.site.relative_sigma == OLD.relative_sigma
    assert "no held-out error" in calibration_as_text(result, OLD)


def test_rows_of_one_id_and_one_model_are_held_out_one_by_one(tmp_path: Path) -> None:
    first = next(run for run in vtrain(tmp_path) if run.layout.tp == 1)
    second = next(run for run in vtrain(tmp_path) if run.model == first.model and run.layout.tp == 2)
    result = calibrate([first, replace(second, id=first.id)], OLD, "two")
    assert result.held_out_by == "configuration"
    assert result.held_out is not None and result.held_out > 0


def test_the_interval_is_printed_and_two_agreeing_runs_do_not_make_it_narrow(tmp_path: Path) -> None:
    runs = pretend(vtrain(tmp_path)[:2], OLD.name)
    result = calibrate(runs, OLD, "two")
    low, high = result.interval
    assert low < 0.95 and high == pytest.approx(1 / low)
    assert "interval: 8 of 10 steps take from " in calibration_as_text(result, OLD)


def test_a_site_keeps_the_family_of_its_chips(tmp_path: Path) -> None:
    result = calibrate(vtrain(tmp_path), OLD, "ours")
    assert result.site.chip_family == "a100" and not result.warnings
    write_site(result.site, tmp_path / "ours.yaml")
    kept = read_site(tmp_path / "ours.yaml")
    assert foreign_site(kept, "a800-80g") is None
    assert "is of a100, not of ascend-910b3" in str(foreign_site(kept, "ascend-910b3"))
    assert foreign_site(load_site("all/modern/all"), "ascend-910b3") is None
    started = calibrate(vtrain(tmp_path), load_site("ascend-910b/mindspeed"), "ours")
    assert "from is of ascend-910b" in started.warnings[0]


def bench_of(truth: Site, chip: str, dtype: str = "fp16") -> dict[str, object]:
    """What `anychip bench chip` would have measured of a chip that this site describes."""
    hardware = hardware_of([machine_of_chip(chip, 1)], [dtype])
    shapes = [(m, n, k) for m in (512, 2048, 8192) for n in (1024, 8192) for k in (1024, 4096)]
    gemm = [
        {"m": m, "n": n, "k": k, "dtype": dtype, "flops_per_second": 2 * m * n * k / seconds}
        for m, n, k in shapes
        if (seconds := float(product_seconds(*(np.array(float(x)) for x in (m, n, k)), hardware, truth)))  # type: ignore[arg-type]
    ]
    bandwidth = float(hardware.bandwidth) / 1e9
    return {"gemm": gemm, "memory_gb_per_s": bandwidth, "device": "A chip", "chip": chip, "vendor": "nvidia"}


def test_products_come_from_a_bench_and_the_rest_is_fitted(tmp_path: Path) -> None:
    truth = replace(OLD, matmul_efficiency=0.5, matmul_half_area=2e5, memory_efficiency=1.0)
    runs = pretend(
        vtrain(tmp_path) * 2, OLD.name, matmul_efficiency=0.5, matmul_half_area=2e5, intra_node_efficiency=0.5
    )
    start, measured = with_measured_products(OLD, bench_of(truth, "a100-80g"), runs)
    assert set(measured) == {"matmul_efficiency", "matmul_half_area", "matmul_fill_length"}
    assert start.matmul_efficiency == pytest.approx(0.5, rel=0.15)
    site = calibrate(runs, start, "ours", measured=measured).site
    assert site.matmul_efficiency == start.matmul_efficiency
    assert site.matmul_half_area == start.matmul_half_area
    assert site.intra_node_efficiency < OLD.intra_node_efficiency
    assert "products of A chip" in site.source


def test_a_bench_of_another_chip_is_refused(tmp_path: Path) -> None:
    bench = bench_of(OLD, "a100-80g")
    with pytest.raises(InputError, match="measured on h100-sxm, and the runs are of a100-80g"):
        with_measured_products(OLD, {**bench, "chip": "h100-sxm"}, vtrain(tmp_path))
    faster = [{**case, "flops_per_second": 1e15} for case in bench["gemm"]]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="times as fast as the peak of a100-80g"):
        with_measured_products(OLD, {**bench, "chip": None, "gemm": faster}, vtrain(tmp_path))


def test_calibrate_on_the_command_line(tmp_path: Path) -> None:
    bench, out = tmp_path / "chip.json", tmp_path / "ours.yaml"
    bench.write_text(json.dumps(bench_of(OLD, "a100-80g")))
    arguments = ["plan", "calibrate", "--runs", str(write_vtrain(tmp_path / "v.csv")), "--out", str(out)]
    told = CliRunner().invoke(app, [*arguments, "--bench", str(bench)])
    assert told.exit_code == 0, told.output
    assert "held out by model" in told.output and "interval" in told.output
    assert read_site(out).chip_family == "a100"
    told = CliRunner().invoke(
        app, ["plan", "validate", "--runs", str(tmp_path / "v.csv"), "--site", "ascend-910b/mindspeed"]
    )
    assert "note: the site ascend-910b/mindspeed is of ascend-910b, not of a100-80g" in told.output
