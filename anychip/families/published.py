"""What a published checkpoint is made of, whatever its family. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of a published checkpoint and the logical tensors that it is made of.

    `logical` holds one name, or keys and values (k_proj, v_proj) that are interleaved per head, or none: all zeros.
    """

    name: str
    shape: tuple[int, ...]
    logical: tuple[str, ...]
    expert: int | None = None  # of a logical tensor that holds all experts, the part of this one
    turned: tuple[int, int] | None = None  # (rows of a head, first row that turns): there, pairs lie side by side
    factor: float = 1.0  # the published tensor is the logical one times this
    repeats: bool = False  # says again what another tensor says; a reader needs it not
