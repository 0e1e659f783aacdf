"""Growth by processes of torchrun: the bytes of one process alone, and no process that waits for one that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_pool import run_ranks
from test_growth_stream import saved, stream_of

from anychip.errors import InputError
from anychip.grow.stream import grow_checkpoint
from anychip.grow.together import grow_together, open_store, ranks
from anychip.train.checkpoint import CheckpointError
from anychip.train.checkpoint.directory import read_manifest


def grow(folder: Path) -> None:
    processes = ranks()
    assert processes is not None
    assert open_store(folder / "old", processes).open(7).step == 7
    proof = grow_together(stream_of(folder / "old", folder / "together"), {}, processes)
    assert (proof is not None and proof.passed) == processes.is_first
    with pytest.raises(InputError if processes.is_first else CheckpointError, match=r"not overwritten|another process"):
        grow_together(stream_of(folder / "old", folder / "together"), {}, processes)


def test_several_processes_grow_what_one_does_and_end_together(tmp_path: Path) -> None:
    saved(tmp_path / "old")
    run_ranks(2, grow, tmp_path, tmp_path, timeout=120)
    grow_checkpoint(stream_of(tmp_path / "old", tmp_path / "alone"))
    together, alone = (read_manifest(tmp_path / name / "step-000007") for name in ("together", "alone"))
    assert together.files == alone.files and together.tensors == alone.tensors
