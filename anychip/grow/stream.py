"""A published checkpoint into a grown one: file by file, in constant memory, by several processes, and again from where
it stopped.

    TARGET/.growing-STEP-DIGEST/          files, made in any order by whoever
    TARGET/.growing-STEP-DIGEST.notes/    one note a finished file
    TARGET/step-STEP/                     the same files with manifest and marker, when all are there and proved

DIGEST is of the source and of all that decides the result, so that a growth that was killed goes on, and another one
does not mix with it. Which process makes which file, and when, changes no byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.chips.backend import detect_backend
from anychip.data.processes import worker_pool
from anychip.errors import InputError
from anychip.files import sha256_json
from anychip.grow.plan import GrowthPlan
from anychip.grow.proof import Proof, check, prove
from anychip.grow.source import CheckpointRows
from anychip.grow.units import Unit, finished, joined, units, write_unit
from anychip.progress import progress
from anychip.train.checkpoint import CheckpointError, CheckpointInfo
from anychip.train.checkpoint.directory import complete_steps, only_writer, publish, step_name
from anychip.train.checkpoint.manifest import MANIFEST_NAME, Manifest, checked_extra

_UNFINISHED = ".growing-"


@dataclass(frozen=True)
class Stream:
    """One growth of one checkpoint into `target`, the directory of the grown one's `step-N`."""

    source: CheckpointInfo
    plan: GrowthPlan
    target: Path
    extra: Mapping[str, Any]

    @cached_property
    def parent_digest(self) -> str:
        """Digest of the source's manifest, which holds those of all its bytes."""
        return sha256_json(self.source.manifest.model_dump())

    @cached_property
    def directory(self) -> Path:
        decides = [self.parent_digest, self.plan.identity, dict(self.extra)]
        return self.target / f"{_UNFINISHED}{self.source.step:06d}-{sha256_json(decides)[:16]}"

    @property
    def notes(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.notes")

    @property
    def final(self) -> Path:
        return self.target / step_name(self.source.step)

    def units(self) -> list[Unit]:
        return units(self.plan, self.source.manifest)

    def make(self, parts: list[Unit], wrote: Callable[[int], None] = lambda nbytes: None) -> None:
        """Make these files, those that are finished left as they are; `wrote` is told the bytes."""
        old = CheckpointRows(self.source.path, self.source.manifest)
        try:
            for unit in parts:
                if finished(unit, self.directory, self.notes) is not None:
                    wrote(unit.nbytes)
                else:
                    write_unit(self.plan, unit, old, self.directory, self.notes, wrote)
        except OSError as error:
            raise CheckpointError(
                f"could not be written: {error.strerror or error}.",
                where=self.directory,
                do="Free space there and run it again: finished files are kept.",
            ) from error
        finally:
            old.close()

    def begin(self) -> None:
        """Make room for the files; what another, abandoned growth left is removed."""
        self.target.mkdir(parents=True, exist_ok=True)
        if self.source.step in complete_steps(self.target):
            raise InputError("is there already and is not overwritten.", where=self.final, do="Continue from it.")
        if self.final.exists() and not self.directory.exists():  # killed between the renaming and the marker
            self.final.rename(self.directory)
        for entry in self.target.glob(f"{_UNFINISHED}*"):
            if entry not in (self.directory, self.notes):
                shutil.rmtree(entry, ignore_errors=True)
        self.directory.mkdir(exist_ok=True)
        self.notes.mkdir(exist_ok=True)

    def publish(self, texts: Mapping[str, Tensor], *, prove_it: bool = True) -> Proof | None:
        """Prove, write manifest and marker; all files are there. Raises UnfitError when the logits changed."""
        (self.directory / MANIFEST_NAME).unlink(missing_ok=True)
        parts = self.units()
        unproved = joined(self.source.step, {}, parts, self.directory, self.notes)
        proof = self._prove(unproved, texts) if prove_it else None
        extra = checked_extra({**self.extra, "lineage": self._lineage(proof)})
        publish(self.directory, unproved.model_copy(update={"extra": extra}))
        shutil.rmtree(self.notes, ignore_errors=True)
        return proof

    def _prove(self, manifest: Manifest, texts: Mapping[str, Tensor]) -> Proof:
        old, new = CheckpointRows(self.source.path, self.source.manifest), CheckpointRows(self.directory, manifest)
        try:
            proof = prove(self.plan, old, new, texts)
        finally:
            old.close()
            new.close()
        check(proof, self.directory)
        return proof

    def _lineage(self, proof: Proof | None) -> list[dict[str, Any]]:
        """The growths that led here, the last one at the end."""
        mine = {
            "step": self.source.step,
            "parent": self.parent_digest,
            "growth": self.plan.as_record(),
            "proof": proof.as_record() if proof else None,
        }
        return [*self.source.extra.get("lineage", []), mine]


def kept_extra(info: CheckpointInfo) -> dict[str, Any]:
    """What a checkpoint says beside its tensors that stays true after growth: the place in the data, the guard."""
    return {name: info.extra[name] for name in ("skipped", "guard", "weights_only") if name in info.extra}


def grow_checkpoint(
    stream: Stream, texts: Mapping[str, Tensor] | None = None, processes: int = 1, *, prove_it: bool = True
) -> Proof | None:
    """The whole growth by processes of this host; publishes `step-N` below the target. Killed, it goes on when it is
    called again. Raises InputError when there is one already, CheckpointError when the disk fails or another process
    is at it, UnfitError when the proof fails."""
    stream.target.mkdir(parents=True, exist_ok=True)
    with only_writer(stream.target):
        stream.begin()
        parts = stream.units()
        total = sum(unit.nbytes for unit in parts)
        with progress("grow", total, "bytes") as bar:
            if processes == 1:
                stream.make(parts, bar.advance)
            else:
                with worker_pool(min(processes, len(parts)), _begin_worker, stream) as pool:
                    for nbytes in pool.map(_make_one, range(len(parts))):
                        bar.advance(nbytes)
        return stream.publish(texts or {}, prove_it=prove_it)


_worker: list[tuple[Stream, list[Unit]]] = []
"""In a worker process: the growth it works at."""


def _begin_worker(stream: Stream) -> None:
    torch.set_num_threads(1)  # the processes share the cores
    detect_backend().prepare_process()
    _worker.append((stream, stream.units()))


def _make_one(number: int) -> int:
    stream, parts = _worker[0]
    stream.make([parts[number]])
    return parts[number].nbytes
