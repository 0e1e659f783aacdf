"""What torchrun loads when it starts: nothing but a name, so that no import goes in a circle."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The entry point `anychip` of group `torchrun.handlers`."""
    return _create


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    from anychip.launch.rendezvous import create

    return create(parameters)
