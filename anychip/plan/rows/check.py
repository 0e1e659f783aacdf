"""Whether a run read from a table can have taken place: damaged cells must not become a figure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from anychip.errors import InputError
from anychip.plan.machine import machine_of_chip
from anychip.plan.rows.run import Incomplete, Run
from anychip.plan.shapes import flops_per_token, work_of
from anychip.plan.table import peak_of

# Far beyond any model; what the cost model computes stays finite below them.
_LARGEST = {
    "layers": 10_000, "hidden": 10**6, "ffn": 10**7, "heads": 10**5, "kv_heads": 10**5, "head_dim": 10**5,
    "vocab": 10**8, "seq_length": 10**9, "global_batch": 10**9,
}  # fmt: skip
_MOST_DEVICES = 10**7
_SLOWEST = 1e-3  # of the peak; the slowest published run reaches 8e-3
_SECONDS = (1e-6, 1e7)
_MEMORY_BYTES = (1e5, 1e14)


def checked(run: Run) -> Run:
    """The run itself. Raises Incomplete with the first thing about it that cannot be."""
    for contradiction in _contradictions(run):
        raise Incomplete(contradiction)
    try:
        machine = machine_of_chip(run.chip, run.devices, devices_per_node=run.devices_per_node)
    except InputError as error:
        raise Incomplete(error.what.rstrip(".")) from None
    if run.seconds and machine.peak_flops:
        _check_speed(run, peak_of(machine, run.workload.dtype))
    return run


def _check_speed(run: Run, peak: float) -> None:
    """A time in another unit, or a rate of all devices, is no run that a planner is wrong about."""
    flops = float(flops_per_token(work_of(run.workload))) * run.workload.tokens
    share = flops / (run.seconds or 1.0) / run.devices / peak
    if share > 1:
        raise Incomplete(f"its time means {share:.3g} times the peak of {run.chip}")
    if share < _SLOWEST:
        raise Incomplete(f"its time means {share:.2g} of the peak of {run.chip}: is it in another unit?")


def _contradictions(run: Run) -> Iterator[str]:
    w, layout = run.workload, run.layout
    for name, largest in _LARGEST.items():
        if not 0 < getattr(w, name) <= largest:
            yield f"{name} comes to {getattr(w, name)}"
    if not 0 < run.devices <= _MOST_DEVICES or (run.devices_per_node is not None and run.devices_per_node < 1):
        yield f"it ran on {run.devices} devices"
    if min(layout.dp, layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep, layout.micro_batch) < 1:
        yield f"its layout {layout} has a degree below 1"
    if w.heads % w.kv_heads:
        yield f"{w.heads} heads are not whole groups of {w.kv_heads}"
    if w.experts and not 0 < w.experts.top_k <= w.experts.count <= 10**6:
        yield f"{w.experts.top_k} of {w.experts.count} experts"
    if w.experts and not (0 < w.experts.ffn <= 10**7 and 0 <= w.experts.shared_ffn <= 10**7):
        yield "its experts have no width"
    if w.experts and w.experts.dense_layers > w.layers:
        yield f"{w.experts.dense_layers} of its {w.layers} layers are dense"
    if layout.pp * layout.vpp > w.layers:
        yield f"{w.layers} layers are fewer than pp x vpp = {layout.pp * layout.vpp}"
    if layout.micro_batches(w) < 1:
        yield f"global batch {w.global_batch} is below dp x micro_batch = {layout.dp * layout.micro_batch}"
    if run.seconds is not None and not _SECONDS[0] <= run.seconds <= _SECONDS[1]:
        yield f"its step takes {run.seconds:.3g} s"
    if run.memory_bytes is not None and not _MEMORY_BYTES[0] <= run.memory_bytes <= _MEMORY_BYTES[1]:
        yield f"its peak memory is {run.memory_bytes:.3g} bytes"
    speed = run.inter_node_gbit_per_s
    if speed is not None and not (math.isfinite(speed) and 0 < speed <= 1e6):
        yield f"its network carries {speed:.3g} Gbit/s"
