"""Machines from clusters and the catalogue, from a measured chip, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from plan.workloads import DENSE, LAYOUT, SITE, machine

from anychip.errors import InputError
from anychip.plan.cost import ATTENTION_BACKWARD, ATTENTION_HALF_LENGTH
from anychip.plan.local import machine_of_bench, read_bench, share_of_bench, site_of_bench
from anychip.plan.machine import machine_of_chip, machines_of
from anychip.plan.predict import predict
from anychip.plan.sites import default_site, trained_here
from anychip.plan.types import Layout, Site, Workload
from anychip.recipe.cluster import Cluster

SMALL = Workload("small", 4, 256, 688, 4, 4, 64, 2048, 256, 8, dtype="fp32", biases="telechat2")


def test_a_cluster_file_comes_before_the_catalogue() -> None:
    cluster = Cluster.model_validate(
        {
            "name": "c",
            "groups": [
                {"name": "a", "chip": "ascend-910b3", "nodes": 4, "inter_node_gbit_per_s": 100},
                {"name": "b", "chip": "ascend-910c-die", "nodes": 4, "supernode_nodes": 2},
            ],
        }
    )
    first, second = machines_of(cluster)
    assert (first.devices, first.devices_per_node) == (32, 8)
    assert first.tiers[-1].bytes_per_s == 12.5e9
    assert [tier.devices for tier in second.tiers] == [16, 32, 64]
    assert second.tiers[1].bytes_per_s == second.tiers[0].bytes_per_s


def test_assumed_figures_are_listed() -> None:
    found = machine_of_chip("mlu590", 64)
    assert any("between nodes" in text for text in found.assumed)
    assert not machine_of_chip("ascend-910b3", 64).assumed


def test_an_unknown_peak_is_asked_for_and_a_site_can_give_it() -> None:
    chip = machine_of_chip("mlu590", 64)
    with pytest.raises(InputError, match="peak and the memory bandwidth of mlu590"):
        predict(DENSE, LAYOUT, chip, SITE)
    assert predict(DENSE, LAYOUT, chip, default_site("mlu590")).step_seconds > 0
    given = Site(name="measured", peak_tflops=300, memory_gb_per_s=1600)
    assert predict(DENSE, LAYOUT, chip, given).mfu > 0


def test_unknown_chips_are_bad_input() -> None:
    with pytest.raises(InputError, match="not a chip of the catalogue"):
        machine_of_chip("ascend-910z", 8)


def bench() -> dict[str, object]:
    """What `anychip bench chip` would print for a device of 100 GFLOP/s that reaches 80 % of it on large products."""
    cases = []
    for size in (64, 256, 1024):
        flops = 2.0 * size**3
        seconds = flops * (1 + 2e4 / size**2) / 100e9 + 12 * size**2 / 20e9
        cases.append({"dtype": "fp32", "m": size, "n": size, "k": size, "flops_per_second": flops / seconds})
    return {
        "device": "box",
        "chip": None,
        "gemm": cases,
        "attention": [
            {"dtype": "fp32", "pass": "forward", "seq_length": 1024, "flops_per_second": 40e9},
            {"dtype": "fp32", "pass": "forward+backward", "seq_length": 1024, "flops_per_second": 20e9},
        ],
        "loss": [{"dtype": "fp32", "tokens": 512, "vocabulary": 1000, "seconds": 512 * 1000 * 3e-9}],
        "memory_gb_per_s": 20.0,
        "collectives": [
            {"op": "all_reduce", "bytes": 1024, "seconds": 4e-4, "world_size": 2},
            {"op": "all_reduce", "bytes": 1 << 24, "seconds": 0.0168, "world_size": 2},
        ],
    }


def test_a_measured_chip_becomes_a_machine_and_a_site(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench()))
    measured = read_bench(path)
    one, two = (machine_of_bench(measured, count, 8e9) for count in (1, 2))
    site = site_of_bench(measured, "fp32")
    assert two.tiers[0].bytes_per_s == pytest.approx((1 << 24) / 0.0168)
    assert 0.8 <= site.matmul_efficiency <= 1.0
    at_this_length = 1 / (1 + ATTENTION_HALF_LENGTH / 1024)  # of the rate of very long sequences
    passes = (1 + ATTENTION_BACKWARD) / 3  # three are counted of what is measured, and 3.5 by the plan
    assert site.attention_efficiency * at_this_length == pytest.approx(20e9 / one.peak_flops["fp32"] * passes)
    assert site.loss_bytes == pytest.approx(60.0)  # what memory moves while one logit's loss is computed
    alone = predict(SMALL, Layout(zero=0), one, site)
    on_cores = machine_of_bench({**measured, "vendor": "cpu"}, 2, 8e9)
    assert on_cores.peak_flops["fp32"] == one.peak_flops["fp32"] / 2  # two processes share the cores of one CPU
    pair = predict(SMALL, Layout(dp=2, zero=0), two, site)
    assert alone.step_seconds / 2 < pair.step_seconds < alone.step_seconds
    with pytest.raises(InputError, match="no product was measured in fp16"):
        site_of_bench(measured, "fp16")


def test_a_cpu_is_not_held_to_what_chips_with_matrix_units_do() -> None:
    """Rates that do not fall with a short inner length, sums that take the cores that
    compute."""
    measured = {**bench(), "vendor": "cpu"}
    rates = {(1024, 1024, 1024): 95e9, (1024, 1024, 64): 94e9, (512, 512, 512): 96e9}
    measured["gemm"] = [
        {"dtype": "fp32", "m": m, "n": n, "k": k, "flops_per_second": rate} for (m, n, k), rate in rates.items()
    ]
    measured["memory_gb_per_s"] = 1000.0
    on_cpu, elsewhere = site_of_bench(measured, "fp32"), site_of_bench({**measured, "vendor": "any"}, "fp32")
    assert on_cpu.matmul_fill_length == elsewhere.matmul_fill_length == 0.0
    assert on_cpu.data_overlap == 0.0 < elsewhere.data_overlap
    pair = share_of_bench(measured, 2)
    assert pair["loss"][0]["seconds"] == 2 * bench()["loss"][0]["seconds"]  # type: ignore[index]
    assert site_of_bench(measured, "fp32", 2).loss_bytes == pytest.approx(on_cpu.loss_bytes)


def test_work_between_products_is_as_slow_as_it_was_measured() -> None:
    measured = bench()
    machine = machine_of_bench(measured, 1, 8e9)
    layer = replace(SMALL, layers=1, seq_length=512, global_batch=1)
    expected = predict(layer, Layout(zero=0), machine, site_of_bench(measured, "fp32")).time["pointwise"]
    case = {
        "tokens": 512, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 64, "dtype": "fp32", "seconds": 3 * expected,
    }  # fmt: skip
    site = site_of_bench({**measured, "pointwise": [case]}, "fp32")
    assert site.pointwise_efficiency == pytest.approx(1 / 3)
    assert predict(layer, Layout(zero=0), machine, site).time["pointwise"] == pytest.approx(3 * expected)


def test_gradients_of_the_ends_cost_what_they_move() -> None:
    """A vocabulary's weights are in both ends: 4 + 12 bytes each for zeroing and scaling, 12 for adding to others."""
    machine, site = machine_of_bench(bench(), 1, 8e9), site_of_bench(bench(), "fp32")
    alone, four = (
        tuple(
            predict(replace(SMALL, global_batch=rows), Layout(zero=0), machine, chosen).time["ends"]
            for chosen in (site, trained_here(site))
        )
        for rows in (1, 4)
    )
    weights = SMALL.vocab * SMALL.hidden / 20e9
    assert alone[1] - alone[0] == pytest.approx(weights * 16, rel=0.01)
    assert four[1] - four[0] == pytest.approx(weights * (4 * 16 + 3 * 24), rel=0.01)


def test_weights_kept_in_fp32_are_cast_for_every_micro_batch() -> None:
    measured = {**bench(), "gemm": [{**case, "dtype": "bf16"} for case in bench()["gemm"]]}  # type: ignore[attr-defined]
    machine, site = machine_of_bench(measured, 1, 8e9), site_of_bench(measured, "bf16")
    half = replace(SMALL, dtype="bf16", global_batch=1)
    without, cast = (
        predict(half, Layout(zero=0), machine, chosen).time["matmul"] for chosen in (site, trained_here(site))
    )
    weights = SMALL.layers * (2 * 256 * 256 + 2 * 256 * 256 + 3 * 256 * 688)  # norms and biases are few
    assert cast - without == pytest.approx(weights * 12 / 20e9, rel=0.01)


def test_processes_that_share_a_cpu_are_as_fast_as_they_were_measured_together() -> None:
    """Two processes of one thread each reach 70 GFLOP/s where two threads of one reach 100."""
    measured = {**bench(), "vendor": "cpu"}
    measured["shares"] = {
        "processes": 2,
        "gemm": [{**case, "flops_per_second": case["flops_per_second"] * 0.7} for case in bench()["gemm"]],  # type: ignore[attr-defined]
        "attention": bench()["attention"],
        "memory_gb_per_s": 15.0,
    }
    one, two, four = (machine_of_bench(measured, count, 8e9) for count in (1, 2, 4))
    assert two.peak_flops["fp32"] == pytest.approx(0.7 * one.peak_flops["fp32"])
    assert four.peak_flops["fp32"] == pytest.approx(0.35 * one.peak_flops["fp32"])
    assert (one.memory_bytes_per_s, two.memory_bytes_per_s, four.memory_bytes_per_s) == (20e9, 15e9, 7.5e9)
    pair = predict(SMALL, Layout(dp=2, zero=0), two, site_of_bench(measured, "fp32", 2))
    halves = predict(SMALL, Layout(dp=2, zero=0), machine_of_bench({**bench(), "vendor": "cpu"}, 2, 8e9),
                     site_of_bench({**bench(), "vendor": "cpu"}, "fp32", 2))  # fmt: skip
    assert pair.time["matmul"] < 0.8 * halves.time["matmul"]


@pytest.mark.parametrize("text", ["{", "{}", '{"gemm": [], "memory_gb_per_s": 1, "device": "x"}'])
def test_other_files_are_no_measurements(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(InputError, match="bench chip"):
        read_bench(path)


def test_the_planner_needs_no_torch() -> None:
    names = ("validate", "search", "mixed", "sites", "local", "pipeline")
    code = (
        "; ".join(f"import anychip.plan.{name}" for name in names) + "; import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bigger_node_helps_tensor_parallelism() -> None:
    eight = predict(DENSE, Layout(dp=4, tp=16), machine(), SITE) if DENSE.heads % 16 == 0 else None
    inside = predict(DENSE, Layout(dp=8, tp=8), machine(), SITE)
    assert eight is not None
    assert eight.time["tensor_parallel"] / eight.step_seconds > inside.time["tensor_parallel"] / inside.step_seconds
