"""Which process is on which host, and whose memory mirrors whose."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cached_property

from anychip.train.checkpoint.ranks import Ranks


@dataclass(frozen=True)
class Hosts:
    """`of_rank[r]` is the host of rank r, numbered from 0 in the launcher's order; `rank` is this process."""

    of_rank: tuple[int, ...]
    rank: int

    @classmethod
    def of_environment(cls, ranks: Ranks) -> Hosts:
        """What launchers say: GROUP_RANK counts hosts, LOCAL_WORLD_SIZE their processes. Called by all ranks together.

        Processes of different node names are never taken to be on one host.
        """
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks.size)))
        number = int(os.environ.get("GROUP_RANK", str(ranks.rank // local)))
        keys = [tuple(key) for key in ranks.exchange([number, platform.node()])]
        order = {key: host for host, key in enumerate(sorted(set(keys)))}
        return cls(tuple(order[key] for key in keys), ranks.rank)

    @cached_property
    def ranks_on(self) -> list[list[int]]:
        """The ranks of each host, ascending."""
        found: list[list[int]] = [[] for _ in range(max(self.of_rank) + 1)]
        for rank, host in enumerate(self.of_rank):
            found[host].append(rank)
        return found

    @property
    def here(self) -> int:
        return self.of_rank[self.rank]

    @property
    def beside(self) -> list[int]:
        """The ranks of this host."""
        return self.ranks_on[self.here]

    @property
    def is_leader(self) -> bool:
        """Whether this process does what is done once a host."""
        return self.rank == self.beside[0]

    def mirrors(self, rank: int, peers: int) -> list[int]:
        """The ranks that keep a copy of what `rank` writes: of the same place on each of the next `peers` hosts."""
        host, count = self.of_rank[rank], len(self.ranks_on)
        place = self.ranks_on[host].index(rank)
        others = (self.ranks_on[(host + distance) % count] for distance in range(1, min(peers, count - 1) + 1))
        return [on[place % len(on)] for on in others]
