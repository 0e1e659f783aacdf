"""The measurement is quick, complete, and its figures are those of the machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from anychip.chips.bench import describe, measure_chip
from anychip.chips.bench.collectives import measure_collectives
from anychip.chips.bench.products import SHAPES, measure_products
from anychip.chips.bench.timing import Bench, Budget, median_seconds


@pytest.fixture(scope="module")
def measured() -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYCHIP_CHIP", "cpu")
        return measure_chip(seconds=1.0)


def test_everything_the_planner_reads_is_there(measured: dict[str, object]) -> None:
    result = json.loads(json.dumps(measured))
    assert {entry["dtype"] for entry in result["gemm"]} == {"fp32", "bf16"}
    for entry in [*result["gemm"], *result["attention"]]:
        assert entry["flops_per_second"] > 1e6 and math.isfinite(entry["flops_per_second"])
    assert {"m", "n", "k"} <= set(result["gemm"][0])
    assert {"forward", "forward+backward"} == {entry["pass"] for entry in result["attention"]}
    for kind in ("loss", "pointwise"):
        assert {entry["dtype"] for entry in result[kind]} == {"fp32", "bf16"}
        assert all(0 < entry["seconds"] < 10 for entry in result[kind] + result["shares"][kind])
    assert result["memory_gb_per_s"] > 0.1
    assert {entry["op"] for entry in result["collectives"]} == {"all_reduce", "all_gather", "reduce_scatter"}
    assert all(entry["world_size"] == 2 and entry["backend"] == "gloo" for entry in result["collectives"])
    assert result["vendor"] == "cpu" and result["chip"] is None and result["torch"] == torch.__version__
    shares = result["shares"]
    assert shares["processes"] == 2 and shares["memory_gb_per_s"] > 0.1
    assert {entry["dtype"] for entry in shares["gemm"]} == {"fp32", "bf16"} and shares["attention"]
    text = describe(result)
    assert "TFLOP/s" in text and "2 processes over gloo" in text


def test_a_slow_dtype_does_not_take_minutes() -> None:
    """With a millisecond of budget one case is measured: no rate is known before the first."""
    advanced: list[int] = []
    dtypes = {"bf16": torch.bfloat16}
    found = measure_products(Bench("cpu", torch.device("cpu"), dtypes, lambda: None, lambda: advanced.append(1)), 1e-3)
    assert len(found) <= 1 and len(advanced) == len(SHAPES)


def test_a_budget_judges_by_the_last_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("anychip.chips.bench.timing.time.perf_counter", lambda: now[0])
    budget = Budget(10.0)
    assert budget.allows(1e9)
    budget.spent(1e9, 1.0)
    assert budget.allows(1.9e9) and not budget.allows(2.1e9)
    now[0] = 11.0
    assert not budget.allows(1.0)


def test_the_median_ignores_one_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    now, costs = [0.0], iter([9.0, 1.0, 1.0, 50.0, 1.0, 1.0])
    monkeypatch.setattr("anychip.chips.bench.timing.time.perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(costs)

    assert median_seconds(call, lambda: None, seconds=0.0) == 1.0


def test_one_device_has_nobody_to_talk_to() -> None:
    assert measure_collectives(1, on_cpu=False) == ([], "one device: nothing to communicate with")


def test_a_failing_process_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYCHIP_CHIP", "nonsense")
    found, reason = measure_collectives(1, on_cpu=True)
    assert found == [] and reason is not None and "nonsense" in reason


def test_a_product_is_two_operations_an_entry_and_inner_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anychip.chips.bench.timing.median_seconds", lambda call, synchronize, seconds: 0.5)
    found = measure_products(Bench("cpu", torch.device("cpu"), {"fp32": torch.float32}, lambda: None), 3.0)
    m, n, k = SHAPES[0]
    assert found[0] == {"m": m, "n": n, "k": k, "dtype": "fp32", "flops_per_second": 2 * m * n * k / 0.5}
    assert list(SHAPES) == sorted(SHAPES, key=lambda shape: (math.prod(shape), shape))


def test_the_verb_writes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from anychip.cli import app

    monkeypatch.setattr("anychip.chips.bench.measure_chip", lambda: {"x": 1})
    monkeypatch.setattr("anychip.chips.bench.describe", lambda measured: "figures")
    result = CliRunner().invoke(app, ["bench", "chip", "--out", str(tmp_path / "chip.json")])
    assert result.exit_code == 0 and "figures" in result.output
    assert json.loads((tmp_path / "chip.json").read_text(encoding="utf-8")) == {"x": 1}
