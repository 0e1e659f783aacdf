"""Which documents fed a step, and which steps saw a document: computed from the schedule, so always complete."""

from __future__ import annotations

from dataclasses import dataclass

from anychip.data.corpora import DocumentSpan
from anychip.data.cursor import DataCursor
from anychip.data.loader import TrainingData
from anychip.errors import InputError
from anychip.rundir import RunDirectory

_NOTHING_SKIPPED = DataCursor()


@dataclass(frozen=True)
class Sighting:
    """A document, or a part of it, as labels of one row of one step."""

    step: int
    row: int
    source: str
    epoch: int
    document: DocumentSpan


def documents_of_step(data: TrainingData, step: int, cursor: DataCursor = _NOTHING_SKIPPED) -> list[Sighting]:
    """Every document whose tokens the step learned to predict, row by row."""
    return [
        Sighting(step, sample.row, sample.source, sample.epoch, span)
        for sample in data.samples(cursor.position(step))
        for span in sample.documents
    ]


def steps_of_document(
    data: TrainingData, document_id: str, steps: int, cursor: DataCursor = _NOTHING_SKIPPED
) -> list[Sighting]:
    """Every row before step number `steps` that learned from a document, in order of time.

    Raises InputError when no training corpus has a document of this id.
    """
    for number, corpus in enumerate(data.corpora):
        document = corpus.find_document(document_id)
        if document is None:
            continue
        start, stop = corpus.document_range(document)
        found = []
        for sample in range(start // data.seq_length, -(-stop // data.seq_length)):
            first, last = sample * data.seq_length, (sample + 1) * data.seq_length
            span = DocumentSpan(document_id, document, max(first, start) - start, min(last, stop) - max(first, start))
            places = cursor.position(steps - 1) + 1 if steps else 0
            for place, epoch in data.schedule.places_of(number, sample, places * data.global_batch_size):
                position, row = divmod(place, data.global_batch_size)
                if (step := cursor.step(position)) is not None:
                    found.append(Sighting(step, row, corpus.name, epoch, span))
        return sorted(found, key=lambda sighting: (sighting.step, sighting.row))
    raise InputError(
        f"no training document has the id {document_id}.",
        do="Ids look like SOURCE:path/inside/it; held-out documents are never trained on.",
    )


def describe_step(run: RunDirectory, step: int) -> str:
    """The documents of a step as lines of text, for the terminal."""
    sightings = documents_of_step(TrainingData(run, run.read_recipe()), step, DataCursor.of_run(run))
    return "\n".join([f"step {step} learned from", *map(_line, sightings)])


def describe_document(run: RunDirectory, document_id: str) -> str:
    """The steps of the recipe that learned from a document as lines of text, for the terminal."""
    recipe = run.read_recipe()
    sightings = steps_of_document(TrainingData(run, recipe), document_id, recipe.training.steps, DataCursor.of_run(run))
    steps = len({sighting.step for sighting in sightings})
    heading = f"{document_id}: seen in {steps} of {recipe.training.steps} steps"
    return "\n".join([heading, *map(_line, sightings)])


def _line(sighting: Sighting) -> str:
    span = sighting.document
    tokens = f"tokens {span.start}-{span.start + span.tokens - 1}"
    return f"  step {sighting.step} row {sighting.row} epoch {sighting.epoch}: {span.id} {tokens}"
