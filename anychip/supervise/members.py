"""Which hosts take part: those that came first, as many as the layout works with; the others wait as spares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Share:
    """A host's part of a generation: `slots` processes, the first of them with number `first_rank`."""

    name: str
    address: str
    slots: int
    first_rank: int

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.slots)


@dataclass
class _Host:
    address: str
    slots: int
    available: bool = True


@dataclass
class Members:
    """`least` to `most` hosts; `possible` says whether the layout works with so many processes.

    A host keeps its place in the order in which hosts first came, so that ranks stay where they are when it leaves and
    comes back.
    """

    least: int
    most: int
    possible: Callable[[int], bool]
    quarantined: dict[str, str] = field(default_factory=dict)  # why, by name
    _hosts: dict[str, _Host] = field(default_factory=dict)

    def came(self, name: str, address: str, slots: int) -> None:
        """A host is there, for the first time or again."""
        if name in self._hosts:
            host = self._hosts[name]
            host.address, host.slots, host.available = address, slots, True
        else:
            self._hosts[name] = _Host(address, slots)

    def went(self, name: str) -> None:
        if name in self._hosts:
            self._hosts[name].available = False

    def available(self, without: str | None = None) -> list[str]:
        """Hosts that could take part, in order."""
        return [
            name
            for name, host in self._hosts.items()
            if host.available and name not in self.quarantined and name != without
        ]

    def choose(self, without: str | None = None) -> list[Share]:
        """The hosts of the next generation and their ranks; none when there are too few."""
        names = self.available(without)
        for count in range(min(len(names), self.most), self.least - 1, -1):
            shares = self._shares(names[:count])
            if shares and self.possible(sum(share.slots for share in shares)):
                return shares
        return []

    def leave_out(self, name: str, why: str, members: Sequence[str]) -> str | None:
        """Quarantine a member: replace when a spare takes its place, shrink when it has to do without, and None, with
        nothing changed, when neither can be."""
        if name in self.quarantined or not (rest := self.choose(without=name)):
            return None
        self.quarantined[name] = why
        return "replace" if len(rest) >= len(members) else "shrink"

    def would_grow(self, members: Sequence[Share]) -> bool:
        """Whether more processes could take part than do."""
        return sum(share.slots for share in self.choose()) > sum(share.slots for share in members)

    def _shares(self, names: Sequence[str]) -> list[Share]:
        shares, first = [], 0
        for name in names:
            host = self._hosts[name]
            shares.append(Share(name, host.address, host.slots, first))
            first += host.slots
        return shares
