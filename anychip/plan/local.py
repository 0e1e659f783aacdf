"""The machine at hand as the planner sees it: what `anychip bench chip` measured, as a machine and a site.

The peak is the fastest product measured, so the site's efficiencies are near one and say how products of other shapes
and attention compare with it.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anychip.errors import InputError
from anychip.plan.calibrate import BASES, KNOBS
from anychip.plan.cost import ATTENTION_BACKWARD, ATTENTION_HALF_LENGTH
from anychip.plan.gemm import product_seconds
from anychip.plan.predict import predict
from anychip.plan.table import Hardware, hardware_of
from anychip.plan.types import Layout, LinkTier, Machine, Site, Workload

_FIELDS = ("gemm", "memory_gb_per_s", "device")


def read_bench(path: Path) -> dict[str, Any]:
    """The JSON of `anychip bench chip`. Raises InputError when it is not that."""
    try:
        bench = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot be read as JSON: {error}.", where=path, do="Write it with `anychip bench chip`."
        ) from None
    missing = [name for name in _FIELDS if not isinstance(bench, dict) or name not in bench]
    if missing or not bench["gemm"] or not bench["memory_gb_per_s"]:
        raise InputError(
            f"lacks {', '.join(missing) or 'measured products or memory'}.",
            where=path,
            do="Write it with `anychip bench chip --out FILE`.",
        )
    return bench


def memory_here() -> float:
    """Bytes of memory of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def share_of_bench(bench: dict[str, Any], processes: int) -> dict[str, Any]:
    """What one of `processes` on the measured machine has: a device of its own, or, on a CPU, its share of the cores,
    as it was measured beside others; divided where so many were not."""
    if bench.get("vendor") != "cpu" or processes == 1:
        return bench
    shares: dict[str, Any] = bench.get("shares") or {}
    together = shares.get("processes", 1) if shares.get("gemm") else 1
    measured = {**bench, **shares} if 1 < together <= processes else bench
    divisor = processes / (together if measured is not bench else 1)
    faster = {
        kind: [{**case, "flops_per_second": case["flops_per_second"] / divisor} for case in measured.get(kind, [])]
        for kind in ("gemm", "attention")
    }
    slower = {
        kind: [{**case, "seconds": case["seconds"] * divisor} for case in measured.get(kind) or []]
        for kind in ("loss", "pointwise")
    }
    return {**measured, **faster, **slower, "memory_gb_per_s": measured["memory_gb_per_s"] / divisor}


def machine_of_bench(bench: dict[str, Any], processes: int, memory_bytes: float) -> Machine:
    """`processes` on the measured machine."""
    share = share_of_bench(bench, processes)
    bandwidth, latency = _link(bench)
    return Machine(
        name=str(bench["device"]),
        chip=str(bench.get("chip") or "local"),
        devices=processes,
        devices_per_node=processes,
        peak_flops={
            dtype: max(case["flops_per_second"] for case in cases) for dtype, cases in _by_dtype(share).items()
        },
        memory_bytes=memory_bytes / processes,
        memory_bytes_per_s=share["memory_gb_per_s"] * 1e9,
        tiers=(LinkTier("node", processes, bandwidth, latency),),
    )


def site_of_bench(bench: dict[str, Any], dtype: str, processes: int = 1) -> Site:
    """Efficiencies of products and attention in `dtype` for one of `processes`; the rest as modern software has it.

    Products are fitted by the least distance of log(time) over efficiency, half area and fill length, on a grid: three
    scalars do not need more. Attention is what its rate at the measured lengths, with the backward pass, says of very
    long ones: that may pass the fastest product. The loss and the work between products are as slow as measured, told
    as bytes and as a share of memory's rate.
    """
    share = share_of_bench(bench, processes)
    cases = _by_dtype(share).get(dtype)
    if not cases:
        known = ", ".join(sorted(_by_dtype(share)))
        raise InputError(f"no product was measured in {dtype}.", do=f"Measured types: {known}.")
    machine, of_cpu = machine_of_bench(bench, processes, 1.0), bench.get("vendor") == "cpu"
    base = replace(BASES["fsdp"], name=f"{bench['device']}, {dtype}", memory_efficiency=1.0, intra_node_efficiency=1.0)
    hardware = hardware_of([machine], [dtype])
    products = _site_of_products(base, cases, hardware)
    passes = (1 + ATTENTION_BACKWARD) / 3  # that the cost counts, to those that "forward+backward" does
    attention = [
        passes * case["flops_per_second"] * (1 + ATTENTION_HALF_LENGTH / case["seq_length"]) / float(hardware.peak)
        for case in _measured(share, "attention", dtype)
        if case["pass"] == "forward+backward"
    ]
    losses = [
        case["seconds"] / (case["tokens"] * case["vocabulary"]) * float(hardware.bandwidth)
        for case in _measured(share, "loss", dtype)
    ]
    pointwise = [
        _pointwise_seconds(case, machine, products) / case["seconds"] for case in _measured(share, "pointwise", dtype)
    ]
    return replace(
        products,
        attention_efficiency=statistics.median(attention or [base.attention_efficiency]),
        loss_bytes=statistics.median(losses or [base.loss_bytes]),
        pointwise_efficiency=statistics.median(pointwise or [1.0]),
        data_overlap=0.0 if of_cpu else base.data_overlap,  # there sums take the cores that compute
        reserved_bytes=3e8,  # interpreter and libraries of one process
        relative_sigma=0.2,
        source=f"anychip bench chip: {len(cases)} products",
    )


def _measured(bench: dict[str, Any], kind: str, dtype: str) -> list[dict[str, Any]]:
    return [case for case in bench.get(kind) or [] if case["dtype"] == dtype]


def _site_of_products(base: Site, cases: list[dict[str, Any]], hardware: Hardware) -> Site:
    """The base with the efficiency, half area and fill length that come nearest to the measured products."""
    m, n, k = (np.array([case[name] for case in cases], dtype=np.float64) for name in ("m", "n", "k"))
    measured = 2 * m * n * k / np.array([case["flops_per_second"] for case in cases])
    area = KNOBS["matmul_half_area"]
    candidates = [
        replace(base, matmul_efficiency=float(efficiency), matmul_half_area=float(half), matmul_fill_length=fill)
        for efficiency in np.linspace(0.3, 1.0, 29)
        for half in np.geomspace(area.low / 100, area.high, 25)
        for fill in (0.0, 16.0, 64.0)
    ]
    return min(candidates, key=lambda site: _distance(product_seconds(m, n, k, hardware, site), measured))


def _pointwise_seconds(case: dict[str, Any], machine: Machine, site: Site) -> float:
    """What the plan says of the measured work between products."""
    layer = Workload(
        "layer", 1, case["hidden_size"], case["intermediate_size"], case["num_attention_heads"],
        case["num_key_value_heads"], case["head_dim"], 1, case["tokens"], 1, dtype=case["dtype"],
    )  # fmt: skip
    return predict(layer, Layout(zero=0), replace(machine, devices=1, devices_per_node=1), site).time["pointwise"]


def _distance(predicted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.abs(np.log(predicted / measured)).sum())


def _by_dtype(bench: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for case in bench["gemm"]:
        found.setdefault(case["dtype"], []).append(case)
    return found


def _link(bench: dict[str, Any]) -> tuple[float, float]:
    """Bytes/s of a ring through the measured processes, and seconds of a hop; memory's speed where nothing was."""
    reduced = [case for case in bench.get("collectives") or [] if case["op"] == "all_reduce"]
    if not reduced:
        return bench["memory_gb_per_s"] * 1e9, 1e-5
    small, large = min(reduced, key=lambda case: case["bytes"]), max(reduced, key=lambda case: case["bytes"])
    ranks = large["world_size"]
    travelled = 2 * (ranks - 1) / ranks * large["bytes"]
    return travelled / large["seconds"], small["seconds"] / 2
