"""Which faults strike, whom, and when: the same for the same numbers, on any machine.

When a fault strikes is counted in beats of the processes, not in seconds, as far as a live machine allows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from anychip.recipe import Recipe

# How often each kind is drawn, in proportion.
_EVERYWHERE = {
    "kill": 4,
    "kill_in_save": 4,
    "kill_again": 2,
    "stop": 1,
    "pause": 2,
    "slow": 1,
    "terminate": 1,
    "flip_and_kill": 2,
    "tear_and_kill": 2,
    "full_disk": 2,
    "disk_error": 2,
    "not_a_number": 1,
}
_STOPS_AT_DAMAGED_DATA = {"damaged_data": 1}
_COMPARES_EVERY_STEP = {"flip_in_memory": 2}
_ONE_HOST = {"kill_supervisor": 2}
_MANY_HOSTS = {"kill_agent": 2, "kill_coordinator": 1, "kill_host": 1}
_NETWORKS = {"partition": 1, "partition_out": 1, "partition_in": 1}
_MOST_BEATS = 32  # about four steps of training
_MOST_CHOICES = 1 << 20


@dataclass(frozen=True)
class Fault:
    """Strikes `rank` once it has begun `beats` more phases after training came back from the fault before. `choice` is
    a number for what else a kind has to choose, such as a bit."""

    kind: str
    rank: int
    beats: int
    choice: int


def kinds(recipe: Recipe, hosts: int, networks: bool) -> dict[str, int]:
    """The kinds that can strike so many hosts, with their weights; `networks`: each has one of its own. A kind that
    this recipe could not come back from as if nothing had happened is left out."""
    found = dict(_EVERYWHERE)
    found |= _STOPS_AT_DAMAGED_DATA if recipe.guard.on_damaged_data == "stop" else {}
    found |= _COMPARES_EVERY_STEP if recipe.guard.digest_interval == 1 else {}
    if hosts == 1:
        return found | _ONE_HOST
    return found | _MANY_HOSTS | (_NETWORKS if networks else {})


def left_out(recipe: Recipe) -> list[str]:
    """What this recipe does not let strike, and why, in words."""
    found = []
    if recipe.guard.digest_interval != 1:
        found.append("flip_in_memory needs guard.digest_interval=1")
    if recipe.guard.on_damaged_data != "stop":
        found.append("damaged_data needs guard.on_damaged_data=stop: batches that are left out change the result")
    if not recipe.checkpoint.memory_interval:
        found.append("copies in memory need checkpoint.memory_interval")
    return found


def schedule(seed: int, faults: int, processes: int, weights: Mapping[str, int]) -> list[Fault]:
    """`faults` faults of the kinds in `weights`. Every kind comes once, if there is room."""
    chance = random.Random(seed)
    drawn = chance.sample(list(weights), min(faults, len(weights)))
    drawn += chance.choices(list(weights), list(weights.values()), k=faults - len(drawn))
    chance.shuffle(drawn)
    return [
        Fault(kind, chance.randrange(processes), chance.randint(1, _MOST_BEATS), chance.randrange(_MOST_CHOICES))
        for kind in drawn
    ]
