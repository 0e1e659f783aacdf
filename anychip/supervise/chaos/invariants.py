"""What must hold in the history of a run under faults, beside the history of one without (history.py has the facts)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
_HOSTS_THAT_MAY_GO = 1  # of those that hold a copy, with one mirror


def broken_invariants(calm: list[Row], rough: list[Row], steps: int) -> list[str]:
    """Which do not hold, in words: every kind of breach once, with how often it occurred."""
    found = [
        *_Samples(calm).broken(rough, steps),
        *_Writers().broken(rough),
        *_States(calm).broken(rough),
        *_different_restores(rough),
    ]
    first = dict(reversed(found))
    counts = Counter(kind for kind, _ in found)
    return [f"{first[kind]}{f' (and {count - 1} more of this kind)' * (count > 1)}" for kind, count in counts.items()]


Breach = tuple[str, str]  # kind, text


class _Samples:
    """In what is left at the end every process made every step once, with the batch and the loss of the calm run; and
    no step that changed anything had another batch or loss, whatever came of it."""

    def __init__(self, calm: list[Row]) -> None:
        self._calm = {(row["rank"], row["step"]): row for row in calm if row["what"] == "step"}

    def broken(self, rough: list[Row], steps: int) -> Iterable[Breach]:
        lines: dict[int, list[int]] = defaultdict(list)  # the steps behind the present state, by rank
        for row in rough:
            line = lines[row["rank"]] if row["what"] in ("step", "restored") else []
            if row["what"] == "restored":
                if row["step"] > len(line):
                    yield "future", f"{_who(row)} restored step {row['step']} of a history of {len(line)}"
                del line[row["step"] :]
            elif row["what"] == "step":
                if row["step"] != len(line) + 1:
                    yield "order", f"{_who(row)} made step {row['step']} after step {len(line)}"
                calm = self._calm.get((row["rank"], row["step"]), {})
                if row["batch"] != calm.get("batch"):
                    yield "batch", f"{_who(row)} read another batch in step {row['step']} than the calm run"
                if row["applied"]:
                    line.append(row["step"])
                    if row["loss"] != calm.get("loss"):
                        yield "loss", f"{_who(row)} had another loss in step {row['step']} than the calm run"
        for rank, line in lines.items():
            if line != list(range(1, steps + 1)):
                yield "lost", f"rank {rank} ended with {len(line)} steps, not with 1 to {steps} once each"


class _Writers:
    """One process of a generation publishes, ever newer steps, and none once a newer generation has begun."""

    def broken(self, rough: list[Row]) -> Iterable[Breach]:
        newest, writers, last = 0, dict[int, int](), dict[int, int]()
        for row in rough:
            what, generation = row["what"], row.get("generation", 0)
            if what == "began":
                newest = max(newest, generation)
            elif what == "restored" and row["rank"] == 0:
                last[generation] = row["step"]  # a state that was gone back to: those after it are made again
            elif what in ("claims", "commits", "part", "copied") and generation < newest:
                yield "fence", f"{_who(row)} {what} step {row['step']} after generation {newest} had begun"
            if what == "claims":
                if writers.setdefault(generation, row["pid"]) != row["pid"]:
                    yield "writers", f"two processes of generation {generation} published checkpoints"
                if row["step"] <= last.get(generation, 0):
                    yield "monotone", f"{_who(row)} published step {row['step']} after step {last[generation]}"
                last[generation] = row["step"]


@dataclass
class _Copy:
    """In memory. `forgotten` counts hosts that lost theirs since."""

    step: int
    forgotten: int = 0


class _States:
    """A state has the same digest whoever saves it, and that of the calm run where that saved it; what is restored was
    saved, and is the newest good one that is left."""

    def __init__(self, calm: list[Row]) -> None:
        self._known: dict[int, str] = {}
        self._parts: dict[str, dict[int, Row]] = defaultdict(dict)  # of copies that are not whole yet, by attempt
        self._good, self._copies = set[int](), list[_Copy]()
        for _ in self.broken(calm):
            pass
        self._good.clear()
        self._copies.clear()
        self._parts.clear()

    def broken(self, rows: list[Row]) -> Iterable[Breach]:
        for row in rows:
            what = row["what"]
            if what == "claims":
                yield from self._save(row, _state(row))
            elif what == "commits":
                self._good.add(row["step"])
            elif what == "part":
                yield from self._take_part(row)
            elif what == "copied":
                self._copies.append(_Copy(row["step"]))
            elif what == "damaged":
                self._good.discard(row["step"])
            elif what == "forgot":
                for copy in self._copies:
                    copy.forgotten += 1
            elif what == "restored":
                yield from self._restore(row)

    def _save(self, row: Row, state: str) -> Iterable[Breach]:
        if self._known.setdefault(row["step"], state) != state:
            yield "state", f"{_who(row)} saved another state of step {row['step']} than was saved before"

    def _take_part(self, row: Row) -> Iterable[Breach]:
        found = self._parts[row["attempt"]]
        found[row["rank"]] = row
        if len(found) == row["world_size"]:
            del self._parts[row["attempt"]]
            total = sum(int(part["boxes"], 16) for part in found.values()) % (1 << 256)
            yield from self._save(row, _state({**row, "boxes": f"{total:064x}"}))

    def _restore(self, row: Row) -> Iterable[Breach]:
        if row["step"] and self._known.get(row["step"]) != _state(row) and not self._was_cut_off(row["step"]):
            yield "unknown", f"{_who(row)} restored a state of step {row['step']} that was never saved"
        if row["rank"] == 0:
            left = [copy.step for copy in self._copies if copy.forgotten <= _HOSTS_THAT_MAY_GO]
            if row["step"] < (newest := max([*self._good, *left], default=0)):
                yield "older", f"{_who(row)} restored step {row['step']} though step {newest} was there"
            if row["source"] != "memory":  # none survives that
                self._copies.clear()

    def _was_cut_off(self, step: int) -> bool:
        """Whether a process may have been killed between writing its part of a copy and telling of it."""
        return step not in self._known and any(
            part["step"] == step for parts in self._parts.values() for part in parts.values()
        )


def _different_restores(rows: list[Row]) -> Iterable[Breach]:
    """The processes of a generation restore the same states."""
    restored: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["what"] == "restored":
            restored[row["generation"]][row["rank"]].append(f"{row['step']}:{_state(row)}")
    for generation, of_ranks in restored.items():
        first, *others = of_ranks.values()
        for other in others:
            if any(one != two for one, two in zip(first, other, strict=False)):
                yield "restores", f"processes of generation {generation} restored different states"


def _state(row: Row) -> str:
    return f"{row['boxes']}:{row['extra']}"


def _who(row: Row) -> str:
    return f"rank {row['rank']} of generation {row['generation']}"
