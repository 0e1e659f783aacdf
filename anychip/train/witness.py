"""What training tells whoever writes down where weights come from (anychip/attest), and asks before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from anychip.chips.backend import Backend
from anychip.data.batch import Batch
from anychip.data.cursor import DataCursor
from anychip.parallel.processes import Processes

if TYPE_CHECKING:
    from anychip.train.checkpoint import CheckpointInfo


class Witness(Protocol):
    """All processes of a job call it together, at the same points."""

    def begin(self, processes: Processes, backend: Backend, directory: Path, checkpoints: Path) -> None:
        """Before anything is built; `directory` will hold logs, `checkpoints` what is saved. Called again for a model
        that grew. Raises UnfitError on all processes when one of them may not take part."""

    def restored(self, step: int, info: CheckpointInfo | None, arithmetic: str) -> None:
        """Training stands at `step`, from a checkpoint or from the beginning; once at the start, then at each return to
        an older state."""

    def stepped(self, step: int, position: int, batch: Batch, loss: float, grad_norm: float) -> None:
        """`step` (from 1) is done, with the batch of this number."""

    def claim(self, step: int, cursor: DataCursor) -> dict[str, Any]:
        """The state of `step` is about to be saved: what its checkpoint says of where it comes from, as JSON."""

    def settle(self) -> None:
        """Checkpoints that were being written may be there now."""
