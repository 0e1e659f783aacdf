"""Checkpoints named by step: hashed, verified before they are published, and never half there."""

from anychip.train.checkpoint.directory import CheckpointError
from anychip.train.checkpoint.store import CheckpointInfo, CheckpointStore, SaveReport

__all__ = ["CheckpointError", "CheckpointInfo", "CheckpointStore", "SaveReport"]
