"""A hand-written subset of published runs in the two formats that `validate` reads.

Table 1: arXiv 2104.04473. SimuMax: github.com/MooreThreads/SimuMax docs/b200 (v1.2). MindSpeed-LLM and TeleChat2:
their READMEs. vTrain: github.com/VIA-Research/vTrain (MIT).
"""

from __future__ import annotations

import csv
from pathlib import Path

from anychip.plan.rows import RUN_COLUMNS, VTRAIN_MULTI_COLUMNS

_T1 = {
    "source": "arXiv 2104.04473 Table 1", "framework": "Megatron-LM", "chip": "A100-80G-SXM", "devices_per_node": "8",
    "inter_node_link": "8x200Gb/s HDR InfiniBand per node", "vocab": "51200", "gated_mlp": "", "seq_len": "2048",
    "recompute": "full", "precision": "fp16 mixed",
    "flops_convention": "hardware FLOPs incl. full activation recompute: F=96*B*s*l*h^2*(1+s/6h+V/16lh) (4x fwd)",
}  # fmt: skip
# name, devices, layers, hidden, heads, batch, tp, pp, dp, TFLOP/s
_T1_ROWS = (
    ("1.7B", 32, 24, 2304, 24, 512, 1, 1, 32, 137),
    ("3.6B", 64, 30, 3072, 32, 512, 2, 1, 32, 138),
    ("7.5B", 128, 36, 4096, 32, 512, 4, 1, 32, 142),
    ("18.4B", 256, 40, 6144, 48, 1024, 8, 1, 32, 135),
    ("39.1B", 512, 48, 8192, 64, 1536, 8, 2, 32, 138),
    ("76.1B", 1024, 60, 10240, 80, 1792, 8, 4, 32, 140),
    ("145.6B", 1536, 80, 12288, 96, 2304, 8, 8, 24, 148),
    ("310.1B", 1920, 96, 16384, 128, 2160, 8, 16, 15, 155),
    ("529.6B", 2520, 105, 20480, 128, 2520, 8, 35, 9, 163),
    ("1008.0B", 3072, 128, 25600, 160, 3072, 8, 64, 6, 163),
)
_B200 = {
    "source": "github MooreThreads/SimuMax docs/b200", "framework": "Megatron-LM (23e00ed) + TE 2.11",
    "chip": "B200-SXM", "chip_count": "8", "devices_per_node": "8", "vocab": "128256", "gated_mlp": "1",
    "seq_len": "4096", "micro_batch": "1", "vpp": "1", "ep": "1", "zero_stage_or_dist_opt": "dist_opt",
    "sequence_parallel": "1", "recompute": "none", "precision": "bf16", "flops_convention": "none",
    "notes": "no TP/DP comm overlap flags; CP via a2a (Ulysses-style)",
}  # fmt: skip
# name, layers, hidden, ffn, heads, kv_heads, seq, batch, tp, pp, dp, cp, seconds, GiB
_B200_ROWS = (
    ("70b-tp1pp2", 12, 8192, 28672, 64, 8, 4096, 16, 1, 2, 4, 1, 0.843, 66.55),
    ("70b-tp2", 12, 8192, 28672, 64, 8, 4096, 32, 2, 1, 4, 1, 1.387, 60.68),
    ("70b-tp8", 12, 8192, 28672, 64, 8, 4096, 32, 8, 1, 1, 1, 2.0737, 28.29),
    ("405b-tp4", 4, 16384, 53248, 128, 16, 4096, 8, 4, 1, 2, 1, 0.476, 52.89),
    ("70b-tp1cp8", 12, 8192, 28672, 64, 8, 131072, 4, 1, 1, 1, 8, 11.3019, 147.99),
)
TELECHAT2_115B = {
    "id": "telechat2-115b", "source": "github Tele-AI/TeleChat2 README.md", "framework": "MindSpore/MindFormers",
    "chip": "Ascend-910B", "chip_count": "512", "devices_per_node": "8", "model_name": "TeleChat2-115B",
    "layers": "96", "hidden": "8192", "ffn": "40960", "heads": "64", "kv_heads": "8", "vocab": "131072",
    "gated_mlp": "1", "seq_len": "8192", "micro_batch": "1", "tp": "8", "pp": "8", "vpp": "3", "dp": "8", "cp": "1",
    "ep": "1", "zero_stage_or_dist_opt": "zero1", "sequence_parallel": "1", "recompute": "selective",
    "tokens_per_s_per_device": "157.29", "notes": "inferred gbs = dp8*micro_batch_num 8*batch 1 = 64",
}  # fmt: skip
# GPUs, batch, micro, hidden, heads, layers, tp, dp, pp, milliseconds
_VTRAIN_ROWS = (
    (3.6, 64, 512, 8, 3072, 32, 30, 1, 64, 1, 3566.5),
    (3.6, 64, 512, 2, 3072, 32, 30, 2, 32, 1, 4264.2),
    (3.6, 64, 512, 16, 3072, 32, 30, 8, 8, 1, 5017.8),
    (18.4, 256, 1024, 4, 6144, 48, 40, 8, 32, 1, 9927.6),
    (18.4, 256, 1024, 32, 6144, 48, 40, 8, 4, 8, 16241.4),
    (39.1, 512, 1536, 2, 8192, 64, 48, 4, 32, 4, 13875.5),
    (39.1, 512, 1536, 12, 8192, 64, 48, 8, 16, 4, 17182.4),
    (175, 512, 1536, 2, 12288, 96, 96, 8, 8, 8, 55109.6),
    (175, 512, 1536, 6, 12288, 96, 96, 4, 4, 32, 66632.5),
)


def table_1() -> list[dict[str, str]]:
    names = ("id", "chip_count", "layers", "hidden", "heads", "global_batch_sequences", "tp", "pp", "dp")
    rows = []
    for row in _T1_ROWS:
        cells = dict(zip(names, (f"mlm-sc21-t1-{row[0]}", *map(str, row[1:9])), strict=True))
        rows.append({**_T1, **cells, "tflops_per_device": str(row[9])})
    return rows


def b200() -> list[dict[str, str]]:
    names = (
        "id", "layers", "hidden", "ffn", "heads", "kv_heads", "seq_len", "global_batch_sequences", "tp", "pp", "dp",
        "cp", "step_time_s", "peak_mem_gb",
    )  # fmt: skip
    return [{**_B200, **dict(zip(names, map(str, row), strict=True))} for row in _B200_ROWS]


def write_runs(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, RUN_COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_vtrain(path: Path, bom: bool = True) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(VTRAIN_MULTI_COLUMNS)
        for size, gpus, batch, micro, hidden, heads, layers, tp, dp, pp, ms in _VTRAIN_ROWS:
            writer.writerow([size, gpus, batch, micro, hidden, heads, layers, 2048, tp, dp, pp, ms])
    return path
