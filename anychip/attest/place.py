"""Where a run keeps what it attests: RUN/attest/{chain.jsonl, objects/}."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anychip.rundir import RunDirectory


@dataclass(frozen=True)
class Place:
    run: RunDirectory

    @property
    def folder(self) -> Path:
        return self.run.root / "attest"

    @property
    def chain(self) -> Path:
        return self.folder / "chain.jsonl"

    @property
    def objects(self) -> Path:
        return self.folder / "objects"

    def checkpoint_roots(self) -> dict[str, Path]:
        """Stages that have left checkpoints."""
        stages = ["pretrain", *(path.parent.name for path in sorted(self.run.root.glob("*/checkpoints")))]
        return {stage: root for stage in stages if (root := self.run.stage_checkpoints(stage)).is_dir()}
