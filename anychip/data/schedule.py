"""The whole order of training: corpora by weight, weights that change at a step, epochs, and the way back.

Forward: a place g = step * global_batch_size + row has one (corpus, epoch, sample). Backward: a sample of a corpus
has its places, one in each epoch. Both are arithmetic; see mixture.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anychip.data.mixture import Integers, Permutation, Turns
from anychip.recipe.schema import Recipe


@dataclass(frozen=True)
class Places:
    """Where `n` places of the global index lead; three int64 arrays [n]."""

    corpus: Integers
    epoch: Integers
    sample: Integers


@dataclass(frozen=True)
class _Phase:
    """From place `start` on, corpora take these turns; corpus c has had `drawn[c]` samples before."""

    start: int
    turns: Turns
    drawn: Integers


class Schedule:
    """The order of the samples of several corpora.

    `names` and `sample_counts` describe the corpora; `changes` are (step, weights), rising, the first at step 0.
    Within an epoch of a corpus each of its samples comes exactly once, in an order keyed by seed, name and epoch;
    an epoch goes on across changes of weight.
    """

    def __init__(
        self,
        names: Sequence[str],
        sample_counts: Sequence[int],
        changes: Sequence[tuple[int, Mapping[str, float]]],
        global_batch_size: int,
        seed: int,
    ) -> None:
        self.names = list(names)
        self.global_batch_size, self.seed = global_batch_size, seed
        self._samples = np.asarray(sample_counts, np.int64)
        self._phases: list[_Phase] = []
        drawn = np.zeros(len(names), np.int64)
        for step, weights in changes:
            start = step * global_batch_size
            if self._phases:
                last = self._phases[-1]
                counts = [last.turns.count(corpus, start - last.start) for corpus in range(len(names))]
                drawn = last.drawn + np.asarray(counts, np.int64)
            self._phases.append(_Phase(start, Turns([weights.get(name, 0.0) for name in names]), drawn))

    @classmethod
    def of_recipe(cls, recipe: Recipe, sample_counts: Sequence[int]) -> Schedule:
        """The schedule of a recipe whose sources hold these numbers of samples."""
        sources = recipe.data.sources
        changes: list[tuple[int, Mapping[str, float]]] = [(0, {source.name: source.weight for source in sources})]
        changes += [(change.step, change.weights) for change in recipe.data.mixture]
        names = [source.name for source in sources]
        return cls(names, sample_counts, changes, recipe.training.global_batch_size, recipe.seed)

    def locate(self, start: int, stop: int) -> Places:
        """What stands at the places start..stop-1."""
        places = np.arange(start, stop, dtype=np.int64)
        corpus, drawn = np.empty_like(places), np.empty_like(places)
        starts = [phase.start for phase in self._phases]
        owner = np.searchsorted(starts, places, side="right") - 1
        for number in np.unique(owner):
            phase, here = self._phases[number], owner == number
            inside = places[here] - phase.start
            corpus[here] = phase.turns.corpus(inside)
            drawn[here] = phase.drawn[corpus[here]] + phase.turns.rank(inside)
        epoch, position = np.divmod(drawn, self._samples[corpus])
        sample = np.empty_like(places)
        for one_corpus, one_epoch in {*zip(corpus.tolist(), epoch.tolist(), strict=True)}:
            here = (corpus == one_corpus) & (epoch == one_epoch)
            sample[here] = self._order(one_corpus, one_epoch)(position[here])
        return Places(corpus, epoch, sample)

    def places_of(self, corpus: int, sample: int, end: int) -> Iterator[tuple[int, int]]:
        """(place, epoch) of a sample at every place below `end`, rising."""
        count = int(self._samples[corpus])
        epoch = 0
        while True:
            place = self._place(corpus, epoch * count + self._order(corpus, epoch).inverse(sample))
            if place is None or place >= end:
                return
            yield place, epoch
            epoch += 1

    def drawn(self, step: int) -> dict[str, int]:
        """How many samples of each corpus the steps before `step` have used."""
        place = step * self.global_batch_size
        phase = next(phase for phase in reversed(self._phases) if phase.start <= place)
        return {
            name: int(phase.drawn[corpus]) + phase.turns.count(corpus, place - phase.start)
            for corpus, name in enumerate(self.names)
        }

    def _order(self, corpus: int, epoch: int) -> Permutation:
        return Permutation(int(self._samples[corpus]), f"{self.seed}/{self.names[corpus]}/{epoch}")

    def _place(self, corpus: int, drawn: int) -> int | None:
        """The place of the sample that a corpus gives as its number `drawn`, or None when it never comes to it."""
        for phase, following in zip(self._phases, [*self._phases[1:], None], strict=True):
            if following is not None and drawn >= following.drawn[corpus]:
                continue
            if not phase.turns.has_turns(corpus):
                return None
            return phase.start + phase.turns.place(corpus, drawn - int(phase.drawn[corpus]))
        return None
