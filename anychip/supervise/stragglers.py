"""Who is slower than its fellows, from how long each process works by itself in a step. Pure: rows in, findings out.

Processes of one pipeline stage have the same to do and are compared with each other; where a stage is one process, it
is compared with all others, and with how it stood to them before. Lengths of sequences change the work of all at once,
and so nothing here. A step counts when a process took a fifth longer than the median of the others, more than such
ratios usually scatter, and when a tenth of the step or more was lost by it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from anychip.train.own_time import SHARED_PHASES, StepTime

_LONGER, _SCATTERS, _SHARE_OF_STEP = 0.2, 5.0, 0.1
_SHORT = 5  # slow in five steps in a row, or
_LONG, _OF_LONG, _LOST = 50, 4, 0.15  # in four of the last fifty that cost a seventh of the time: now and then
_FEWEST = 20  # steps that such a share is told of
_LEAST_SECONDS = 0.5  # lost in fifty steps: what a scheduler does to a process is no news
_WARM_UP = 3  # the first steps allocate, compile, open files
_FEWEST_BEFORE = 10  # steps that tell how a lone process stands to the others
_HISTORY = 100
_NORMAL = 1.4826 / 2**0.5  # from the median change between two steps to a normal deviation
_MANY = 8  # of so many, one does not move the median


@dataclass(frozen=True)
class Slow:
    """Since step `since`, `rank` took `times` as long as its fellows for its own work, most of it in `phase`; `lost` is
    the share of time that the others waited for it."""

    rank: int
    since: int
    step: int
    times: float
    lost: float
    phase: str


@dataclass(frozen=True)
class _Judged:
    """One step of one process: its ratio to the others, seconds lost (in each phase), and whether that counts."""

    step: int
    seconds: float
    times: float
    excess: float
    by_phase: tuple[float, ...]
    slow: bool


@dataclass
class _Rank:
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    judged: deque[_Judged] = field(default_factory=lambda: deque(maxlen=_LONG))
    flagged: bool = False


class Stragglers:
    """`stages` gives the pipeline stage of every rank."""

    def __init__(self, stages: Sequence[int]) -> None:
        self._stages = list(stages)
        self._members: dict[int, list[int]] = defaultdict(list)
        for rank, stage in enumerate(stages):
            self._members[stage].append(rank)
        self._ranks = [_Rank() for _ in stages]
        self._rows: dict[int, dict[int, StepTime]] = defaultdict(dict)
        self._scatter: deque[float] = deque(maxlen=_HISTORY)

    def take(self, rank: int, row: StepTime) -> list[Slow]:
        """Ranks newly found to be slow, once all have sent their row of a step. A rank is named once, and again only
        after fifty steps in which it was as fast as the others."""
        rows = self._rows[row.number]
        rows[rank] = row
        if len(rows) < len(self._ranks):
            return []
        for number in [number for number in self._rows if number <= row.number]:
            del self._rows[number]
        if row.number <= _WARM_UP or len(rows) == 1:
            return []
        return self._judge(rows)

    def _judge(self, rows: Mapping[int, StepTime]) -> list[Slow]:
        scatter = _NORMAL * median(self._scatter) if self._scatter else 0.0
        threshold = max(_LONGER, _SCATTERS * scatter)
        theirs = self._of_fellows(rows)
        judged = [self._compare(rank, rows[rank], theirs[rank], threshold) for rank in range(len(self._ranks))]
        changes = [
            abs(one.times - state.judged[-1].times)
            for one, state in zip(judged, self._ranks, strict=True)
            if state.judged
        ]
        if changes:
            self._scatter.append(median(changes))
        return [found for rank, one in enumerate(judged) if (found := self._finding(rank, one)) is not None]

    def _of_fellows(self, rows: Mapping[int, StepTime]) -> list[tuple[float, ...]]:
        """For each rank the medians of its fellows' own seconds, by phase and in all."""
        shared: dict[int, tuple[float, ...]] = {
            stage: _medians(rows[rank] for rank in ranks)
            for stage, ranks in self._members.items()
            if len(ranks) >= _MANY
        }
        return [
            shared[stage] if stage in shared else _medians(rows[other] for other in self._others(rank))
            for rank, stage in enumerate(self._stages)
        ]

    def _others(self, rank: int) -> list[int]:
        """The others of its stage; of all stages where it is alone."""
        mates = self._members[self._stages[rank]]
        return [other for other in (mates if len(mates) > 1 else range(len(self._stages))) if other != rank]

    def _compare(self, rank: int, mine: StepTime, theirs: Sequence[float], threshold: float) -> _Judged:
        *phases, total = theirs
        ratio = sum(mine.own) / total if total > 0 else 1.0
        usual = self._usual(rank)
        self._ranks[rank].ratios.append(ratio)
        if usual is None:
            return _Judged(mine.step, mine.seconds, 1.0, 0.0, (0.0,) * len(phases), False)
        excess = sum(mine.own) - usual * total
        by_phase = tuple(own - usual * other for own, other in zip(mine.own, phases, strict=True))
        slow = excess > threshold * usual * total and excess > _SHARE_OF_STEP * mine.seconds
        return _Judged(mine.step, mine.seconds, ratio / usual, excess, by_phase, slow)

    def _usual(self, rank: int) -> float | None:
        """How long this rank takes usually, in times of the others: 1 among equals; None while that is unknown."""
        if len(self._members[self._stages[rank]]) > 1:
            return 1.0
        before = list(self._ranks[rank].ratios)[:-_SHORT]
        return (median(before) or None) if len(before) >= _FEWEST_BEFORE else None

    def _finding(self, rank: int, newest: _Judged) -> Slow | None:
        state = self._ranks[rank]
        state.judged.append(newest)
        if state.flagged or not newest.slow:
            state.flagged = state.flagged and any(judged.slow for judged in state.judged)
            return None
        window = _window(list(state.judged))
        if not window:
            return None
        state.flagged = True
        slow = [judged for judged in window if judged.slow]
        phases = [sum(values) for values in zip(*(judged.by_phase for judged in slow), strict=True)]
        return Slow(
            rank,
            slow[0].step,
            newest.step,
            median(judged.times for judged in slow),
            sum(judged.excess for judged in slow) / sum(judged.seconds for judged in window),
            SHARED_PHASES[phases.index(max(phases))],
        )


def _window(judged: list[_Judged]) -> list[_Judged]:
    """The newest steps in which a rank was slow often, or rarely but at a price; empty when it was neither."""
    lost = sum(step.excess for step in judged if step.slow)
    if lost < _LEAST_SECONDS:
        return []
    short = judged[-_SHORT:]
    if len(short) == _SHORT and all(step.slow for step in short):
        return short
    costly = len(judged) >= _FEWEST and lost > _LOST * sum(step.seconds for step in judged)
    return judged if costly and sum(step.slow for step in judged) >= _OF_LONG else []


def _medians(rows: Iterable[StepTime]) -> tuple[float, ...]:
    values = [(*row.own, sum(row.own)) for row in rows]
    return tuple(median(column) for column in zip(*values, strict=True))
