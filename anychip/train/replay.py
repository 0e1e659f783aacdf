"""Sampled replay: a gradient that is wrong before it is summed is the same on all copies afterwards, and no comparison
of copies shows it. So in some steps every process computes a micro-batch of another one again.

All processes wait for each other in a step: that each repeats one micro-batch takes no longer than that one does, and
checks all of them at once. The gradients must be the same bits, or near enough (`guard.replay_tolerance`). When they
are not, further processes compute the micro-batch, the majority is right, and the step is made again before the
optimizer changed anything, which is all the repair there needs to be (arXiv 2604.00726).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.data.batch import Batch
from anychip.errors import InputError
from anychip.parallel.processes import Processes
from anychip.recipe.schema import GuardConfig
from anychip.train.copies import list_suspects, share_suspects
from anychip.train.engine import Engine
from anychip.train.prints import Print, Printer, gather_rows
from anychip.train.sums import SumCheck, SumFault

_Computation = tuple[int, Print]


@dataclass(frozen=True)
class Sample:
    """What a step repeats: pass `number` of every reader, by the reader `shift` places before it."""

    number: int
    shift: int
    second_shift: int


def draw(key: str, step: int, passes: int, readers: int) -> Sample:
    """A pure function of its arguments. With three readers or more, three different ones compute a pass in the end."""
    words = hashlib.blake2b(f"{key} {step}".encode(), digest_size=24).digest()
    number, first, second = (int.from_bytes(words[at : at + 8], "big") for at in (0, 8, 16))
    shift = 1 + first % (readers - 1) if readers > 1 else 0
    others = [s for s in range(1, readers) if s != shift]
    return Sample(number % passes, shift, others[second % len(others)] if others else shift)


@dataclass(frozen=True)
class Disagreement:
    """A pass whose gradients differ. `wrong` are the ranks outvoted; empty when no majority decides. `tensor` differs
    most, by `distance` of its norm at least."""

    tensor: str
    distance: float
    wrong: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def reporter(self) -> int:
        """The one rank that says so."""
        return next((rank for rank in self.ranks if rank not in self.wrong), self.ranks[0])


@dataclass(frozen=True)
class ReplayFault:
    """What a replay found: `disagreements` this process took part in, and everywhere the same, the suspects by rank
    with the names of their nodes."""

    disagreements: tuple[Disagreement, ...]
    suspects: Mapping[int, str]

    def describe(self) -> str:
        return f"a micro-batch has another gradient when it is computed again ({list_suspects(self.suspects)})"

    def rows(self, rank: int) -> list[dict[str, object]]:
        """What this rank has to write down."""
        return [
            {"ranks": list(found.wrong or found.ranks), "tensor": found.tensor, "distance": found.distance}
            for found in self.disagreements
            if found.reporter == rank
        ]


class Replay:
    """Repeats passes of other readers here. All processes call `forward_backward` of a step together. `beat` is called
    after each repetition: this step takes longer than others."""

    def __init__(
        self,
        config: GuardConfig,
        key: str,
        engine: Engine,
        processes: Processes,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        layout = processes.layout
        if layout.pipeline > 1 and layout.shard > 1:
            raise InputError(
                "guard.replay_interval needs gradients before they are summed, and a pipeline of shards "
                "(pipeline_parallel with data_parallel_shard) has none to show.",
                do="Set guard.replay_interval=0, or one of these degrees to 1.",
            )
        if layout.shard > 1 and engine.balance.routers:
            raise InputError(
                "guard.replay_interval repeats another process's tokens, which experts that are shared see in another "
                "order.",
                do="Set guard.replay_interval=0, or parallel.data_parallel_shard=1.",
            )
        self._config, self._key, self._engine, self._processes = config, key, engine, processes
        self._printer, self._beat = Printer(engine, processes.device), beat
        self._sums = SumCheck(engine, processes)
        self._group = processes.group("replicate", "shard")
        self._readers, self._reader = layout.readers, layout.reader(processes.rank)
        self._ranks = [processes.rank] if self._group is None else dist.get_process_group_ranks(self._group)

    def due(self, step: int) -> bool:
        return step % self._config.replay_interval == 0

    def forward_backward(self, step: int, batch: Batch) -> tuple[Tensor, ReplayFault | SumFault | None]:
        """As Engine.forward_backward, and what a repeated pass showed, or the sum. The repetition comes first: then
        there are no gradients yet that would have to be kept beside its own."""
        sample = draw(self._key, step, self._engine.passes, self._readers)
        replayed = self._repeat(batch, sample.number, sample.shift)

        @contextmanager
        def watch(number: int) -> Iterator[None]:
            with self._sums.watch(), self._printer.watch() if number == sample.number else nullcontext():
                yield

        loss = self._engine.forward_backward(batch, watch, self._sums.before_sum)
        wrong_sum = self._sums.fault()
        own = self._printer.take()
        if self._processes.any(not self._equal(own, replayed, sample.shift)):
            return loss, self._vote(batch, sample, own, replayed)
        return loss, wrong_sum

    def _equal(self, own: Print, replayed: Print, shift: int) -> bool:
        """Whether all passes of this group of readers came out twice the same. Bit for bit, two numbers each tell."""
        if self._config.replay_tolerance:
            return not any(self._differ(*pair) for pair in self._pairs(own, replayed, shift))
        both = torch.cat((own.summary(), replayed.summary()))
        rows = torch.stack(gather_rows(both, self._group, self._processes.exchange_device))
        return torch.equal(rows[:, 0], rows[:, 1].roll(shift))

    def _pairs(self, own: Print, replayed: Print, shift: int) -> list[tuple[Print, Print]]:
        first, second = self._gather(0, own), self._gather(shift, replayed)
        return [(mine, other) for (_, mine), (_, other) in zip(first, second, strict=True)]

    def _vote(self, batch: Batch, sample: Sample, own: Print, replayed: Print) -> ReplayFault:
        """A third reader computes the passes too; of two readers, both do once more."""
        shifts = [0, sample.shift] if self._readers == 2 else [sample.second_shift]
        more = [self._gather(shift, self._repeat(batch, sample.number, shift)) for shift in shifts]
        by_pass = list(zip(self._gather(0, own), self._gather(sample.shift, replayed), *more, strict=True))
        found = [self._settle(list(c)) for c in by_pass if self._differ(c[0][1], c[1][1])]
        accused = {rank for disagreement in found for rank in disagreement.wrong or disagreement.ranks}
        return ReplayFault(tuple(found), share_suspects(accused, self._processes))

    def _repeat(self, batch: Batch, number: int, shift: int) -> Print:
        """Repeat a pass of the reader `shift` places on, and leave no gradients."""
        self._drop_gradients()
        with self._printer.watch():
            self._engine.repeat_pass(batch, (self._reader + shift) % self._readers, number)
        self._drop_gradients()
        self._beat()
        return self._printer.take()

    def _drop_gradients(self) -> None:
        for parameter in self._engine.trainable.values():
            parameter.grad = None

    def _gather(self, shift: int, mine: Print) -> list[_Computation]:
        """For each reader's pass, who computed it, `shift` places before it, and what came out."""
        prints = mine.gather(self._group, self._processes.exchange_device)
        computers = [(reader - shift) % self._readers for reader in range(self._readers)]
        return [(computer, prints[computer]) for computer in computers]

    def _differ(self, one: Print, other: Print) -> bool:
        return bool(one.differing(other, self._config.replay_tolerance).any())

    def _settle(self, computations: list[_Computation]) -> Disagreement:
        """Those who agree with each other are right when they made more than half of the computations of a pass."""
        agreeing = [[c for c in computations if not self._differ(c[1], reference[1])] for reference in computations]
        right = max(agreeing, key=len)
        outside = [c for c in computations if all(c is not other for other in right)]
        decided = 2 * len(right) > len(computations)
        tensor, distance = self._largest([c[1] for c in outside], right[0][1])
        wrong = {self._ranks[computer] for computer, _ in outside} if decided else set()
        involved = {self._ranks[computer] for computer, _ in computations}
        return Disagreement(tensor, distance, tuple(sorted(wrong)), tuple(sorted(involved)))

    def _largest(self, wrong: Sequence[Print], right: Print) -> tuple[str, float]:
        """The tensor that differs most, and by what share of its norm."""
        names = list(self._engine.trainable)
        found = [
            (float(found.distances(right)[at]), names[at])
            for found in wrong
            for at in found.differing(right, self._config.replay_tolerance).nonzero().flatten().tolist()
        ]
        distance, name = max(found)
        return name, distance
