"""States small enough to be written hundreds of times, with every kind of tensor that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anychip.train.checkpoint import CheckpointStore


def tiny_state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(7, 5, generator=generator),
        "model.transposed": torch.randn(4, 6, generator=generator).t(),
        "model.half": torch.randn(3, 3, generator=generator).to(torch.bfloat16),
        "model.empty": torch.empty(0, 4),
        "optimizer.step": torch.tensor(seed),
        "optimizer.counts": torch.arange(seed, seed + 5),
        "optimizer.mask": torch.rand(9, generator=generator) > 0.5,
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def newest(root: Path) -> tuple[int, dict[str, Tensor]]:
    """Step and state of the newest good checkpoint."""
    store = CheckpointStore(root)
    info = store.latest()
    assert info is not None
    into = {name: torch.full(entry.shape, 1).to(entry.torch_dtype) for name, entry in info.tensors.items()}
    store.load(info, into)
    return info.step, into


def litter(root: Path) -> list[str]:
    """Names below `root` that are not published checkpoints."""
    return [entry.name for entry in root.iterdir() if not (entry / "COMPLETE").exists()]
