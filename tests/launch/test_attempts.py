"""torchrun's own restarts, over our rendezvous: an attempt reads nothing that an earlier one wrote."""

from __future__ import annotations

import sys
from pathlib import Path

from starts import free_port, left_over, run

_RANK = """
import os, pathlib, sys
import torch, torch.distributed as dist
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
dist.init_process_group("gloo")
total = torch.tensor(float(rank + 1))
dist.all_reduce(total)
if attempt < 3 and rank == attempt % 2:
    os._exit(7)
dist.all_reduce(total)
pathlib.Path(os.environ["TEST_OUT"], f"{rank}.txt").write_text(f"{attempt} {os.environ['MASTER_PORT']}")
dist.destroy_process_group()
"""


def test_processes_of_a_second_attempt_meet_each_other_and_nobody_else(tmp_path: Path) -> None:
    """torch 2.13 alone: 3 of 4 second attempts fail, connecting to addresses that dead processes left."""
    script, port = tmp_path / "rank.py", free_port()
    script.write_text(_RANK, encoding="utf-8")
    done = run(
        tmp_path, sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=3",
        "--rdzv-backend=anychip", f"--rdzv-endpoint=127.0.0.2:{port}", "--rdzv-id=attempts",
        "--rdzv-conf=rank=0,timeout=60", "--monitor-interval=0.1", str(script), seconds=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0][0] == "3"
    assert int(told[0][1]) != port
    assert not left_over(tmp_path)
