"""Measures the chip at hand: products, attention, memory, collectives. Less than a minute on a laptop."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from anychip.chips.bench.attention import SHAPES as ATTENTION_SHAPES
from anychip.chips.bench.collectives import measure_collectives
from anychip.chips.bench.computing import measure_computing
from anychip.chips.bench.products import SHAPES as PRODUCT_SHAPES
from anychip.chips.bench.shares import measure_shares
from anychip.chips.bench.timing import Bench
from anychip.chips.catalog import recognize_chip
from anychip.chips.cpu import cpu_model
from anychip.chips.detect import detect_backend
from anychip.progress import progress

if TYPE_CHECKING:
    import torch

    from anychip.chips.backend import Backend


def measure_chip(seconds: float = 30.0) -> dict[str, Any]:
    """Measure for about `seconds` and return what `plan` reads, as JSON values:

    {"gemm": [{m, n, k, dtype, flops_per_second}], "attention": [{batch, heads, seq_length, head_dim, dtype, pass,
    flops_per_second}], "loss": [{tokens, vocabulary, dtype, seconds}],
    "pointwise": [{tokens, hidden_size, ..., dtype, seconds}], "memory_gb_per_s",
    "collectives": [{op, backend, world_size, bytes, seconds, gb_per_s}], "collectives_missing", "shares", "torch",
    "cpu", "threads", "vendor", "chip", "device"}.

    "shares" is what each of several processes reaches on its share of a CPU, null on other devices. "chip" is the
    catalogue's id, null where the device is not in it. Rates are medians of repeated calls.
    """
    import torch

    backend = detect_backend()
    backend.prepare_process()
    device = backend.device(0)
    dtypes = _dtypes(backend, device)
    on_cpu = device.type == "cpu"
    steps = len(dtypes) * (len(PRODUCT_SHAPES) + len(ATTENTION_SHAPES) + 2) + 3
    with progress("measuring", steps, "cases") as bar:
        bench = Bench(backend.vendor, device, dtypes, backend.synchronize, bar.advance)
        computing = measure_computing(bench, 0.65 * seconds)
        bar.advance()
        collectives, missing = measure_collectives(backend.device_count(), on_cpu)
        bar.advance()
        shares = measure_shares(0.3 * seconds) if on_cpu else None
        bar.advance()
    name = cpu_model() if device.type == "cpu" else _name(device)
    chip = recognize_chip(backend.vendor, name)
    return {
        **computing,
        "collectives": collectives,
        "collectives_missing": missing,
        "shares": shares,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vendor": backend.vendor,
        "chip": chip.id if chip else None,
        "device": name,
        "bf16_in_hardware": backend.multiplies_bf16(),
    }


def describe(measured: dict[str, Any]) -> str:
    """The figures that a person looks for first."""
    lines = [f"{measured['device']}, torch {measured['torch']}, {measured['threads']} threads"]
    for dtype in dict.fromkeys(entry["dtype"] for entry in measured["gemm"]):
        best = max((e for e in measured["gemm"] if e["dtype"] == dtype), key=lambda e: e["flops_per_second"])
        shape = f"{best['m']} x {best['n']} x {best['k']}"
        lines.append(f"{dtype:<5} products   {best['flops_per_second'] / 1e12:8.3f} TFLOP/s at {shape}")
    for dtype in dict.fromkeys(entry["dtype"] for entry in measured["attention"]):
        rate = max(e["flops_per_second"] for e in measured["attention"] if e["dtype"] == dtype)
        lines.append(f"{dtype:<5} attention  {rate / 1e12:8.3f} TFLOP/s")
    lines.append(f"memory           {measured['memory_gb_per_s']:8.1f} GB/s")
    for op in dict.fromkeys(entry["op"] for entry in measured["collectives"]):
        best = max((e for e in measured["collectives"] if e["op"] == op), key=lambda e: e["gb_per_s"])
        lines.append(f"{op:<16} {best['gb_per_s']:8.2f} GB/s, {best['world_size']} processes over {best['backend']}")
    if measured["collectives_missing"]:
        lines.append(f"collectives      not measured: {measured['collectives_missing']}")
    return "\n".join(lines)


def _dtypes(backend: Backend, device: torch.device) -> dict[str, torch.dtype]:
    """bf16 always, since training may choose it; fp16 only where it is fast."""
    import torch

    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return chosen if device.type == "cpu" else {**chosen, "fp16": torch.float16}


def _name(device: torch.device) -> str:
    import torch

    return str(torch.get_device_module(device).get_device_properties(device).name)
