"""Which faults strike, whom, and when: the same for the same numbers, on any machine.

When a fault strikes is counted in beats of the processes, not in seconds, as far as a live machine allows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

# How often each kind is drawn, in proportion.
_EVERYWHERE = {
    "kill": 6,
    "stop": 1,
    "pause": 2,
    "slow": 1,
    "terminate": 1,
    "flip_and_kill": 2,
    "tear_and_kill": 2,
    "full_disk": 2,
}
_ONE_HOST = {"kill_supervisor": 2}
_MANY_HOSTS = {"kill_agent": 2, "kill_coordinator": 1, "kill_host": 1}
_NETWORKS = {"partition": 1}
_MOST_BEATS = 32  # about four steps of training


@dataclass(frozen=True)
class Fault:
    """Strikes `rank` once it has begun `beats` more phases after training came back from the fault before."""

    kind: str
    rank: int
    beats: int


def kinds(hosts: int, networks: bool) -> dict[str, int]:
    """The kinds that can strike so many hosts, with their weights; `networks`: each has one of its own."""
    if hosts == 1:
        return _EVERYWHERE | _ONE_HOST
    return _EVERYWHERE | _MANY_HOSTS | (_NETWORKS if networks else {})


def schedule(seed: int, faults: int, processes: int, weights: Mapping[str, int]) -> list[Fault]:
    """`faults` faults of the kinds in `weights`. Every kind comes once, if there is room."""
    chance = random.Random(seed)
    drawn = chance.sample(list(weights), min(faults, len(weights)))
    drawn += chance.choices(list(weights), list(weights.values()), k=faults - len(drawn))
    chance.shuffle(drawn)
    return [Fault(kind, chance.randrange(processes), chance.randint(1, _MOST_BEATS)) for kind in drawn]
