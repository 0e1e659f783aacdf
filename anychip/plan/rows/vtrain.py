"""Rows of vTrain's files (github.com/VIA-Research/vTrain, MIT): GPT models under Megatron-DeepSpeed."""

from __future__ import annotations

from anychip.plan.rows.cells import Cells
from anychip.plan.rows.run import Incomplete, Run
from anychip.plan.types import Layout, Workload

_VTRAIN_SHARED = (
    "global batch", "micro batch", "hidden size", "attention heads", "# layers", "sequence length",
    "tensor parallelism", "data parallelism", "pipeline parallelism", "iteration time (ms)",
)  # fmt: skip
VTRAIN_MULTI_COLUMNS = ("Parameters (billion)", "# GPUs", *_VTRAIN_SHARED)
VTRAIN_SINGLE_COLUMNS = ("# GPUs", *_VTRAIN_SHARED)


def vtrain_run(row: dict[str, str], number: int) -> Run:
    """One row of either of its files. Raises Incomplete when its cells cannot be read or contradict each other."""
    text = Cells(row, number)
    get = text.needed
    hidden, seq, layers = get("hidden size"), get("sequence length"), get("# layers")
    multi = bool(text.cell("Parameters (billion)"))
    milliseconds = text.number("iteration time (ms)")
    if milliseconds is None:
        raise Incomplete("iteration time (ms) is not printed")
    workload = Workload(
        name=f"gpt-h{hidden}-l{layers}",
        layers=layers,
        hidden=hidden,
        ffn=4 * hidden,
        heads=get("attention heads"),
        kv_heads=get("attention heads"),
        head_dim=hidden // get("attention heads"),
        vocab=51_200,
        seq_length=seq,
        global_batch=get("global batch"),
        dtype="fp16",
        gated=False,
        biases="all",
        norm="layer",
        tied_embeddings=True,
        learned_positions=seq,
    )
    layout = Layout(
        dp=get("data parallelism"),
        tp=get("tensor parallelism"),
        pp=get("pipeline parallelism"),
        zero=0,
        sequence_parallel=False,
        micro_batch=get("micro batch"),
        recompute="full",
    )
    devices = get("# GPUs")
    if layout.devices != devices:
        raise Incomplete(f"tp x dp x pp is {layout.devices}, but # GPUs is {devices}")
    return Run(
        id=f"vtrain-{'multi' if multi else 'single'}-{number}",
        source="vTrain multi-node" if multi else "vTrain single-node",
        publisher="VIA-Research/vTrain",
        model=workload.name,
        software="megatron-2021",
        chip="a100-80g",
        named_chip=True,
        devices=devices,
        devices_per_node=8,
        inter_node_gbit_per_s=100.0,
        network="",
        workload=workload,
        layout=layout,
        seconds=milliseconds / 1e3,
        memory_bytes=None,
        group=f"{workload.name} {devices} {workload.global_batch}",
    )
