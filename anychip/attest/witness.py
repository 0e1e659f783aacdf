"""Writes a run's chain while it trains. The first process writes; all others tell it on which chip they compute.

A checkpoint's `extra` carries its claim: the link that says from which state it came, over which steps and batches, on
which chips. The claim is in the chain before the checkpoint is written, and a link names the checkpoint's manifest when
it is there. So a process may die at any instant: what it left is found by the next start.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anychip.attest.chain import Chain
from anychip.attest.check.findings import Findings
from anychip.attest.check.history import judge
from anychip.attest.objects import keep
from anychip.attest.pins import environment_digest, package_digest, pin_inputs
from anychip.attest.place import Place
from anychip.chips.backend import Backend
from anychip.chips.inventory import inventory
from anychip.data.batch import Batch
from anychip.data.cursor import DataCursor
from anychip.errors import AnychipError, UnfitError
from anychip.files import sha256_json
from anychip.parallel.processes import Processes
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointInfo
from anychip.train.checkpoint.directory import MARKER_NAME, complete_steps, step_name
from anychip.train.checkpoint.manifest import MANIFEST_NAME
from anychip.train.checkpoint.ranks import Ranks
from anychip.train.guard import LOG_NAME as GUARD_LOG
from anychip.train.witness import Witness

_OWN_EXTRA = ("identity", "arithmetic", "skipped", "guard", "attest")  # what any checkpoint says; the rest is its story


class Trace:
    """What was trained since the last claim."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.losses: list[float | str] = []
        self.grad_norms: list[float | str] = []
        self.started = time.monotonic()
        self._ledger = hashlib.sha256()

    def add(self, position: int, batch: Batch, loss: float, grad_norm: float) -> None:
        self.batches.append(position)
        self.losses.append(loss if math.isfinite(loss) else str(loss))
        self.grad_norms.append(grad_norm if math.isfinite(grad_norm) else str(grad_norm))
        self._ledger.update(batch_bytes(position, batch))

    @property
    def ledger(self) -> str:
        """SHA-256 of all batches since the last claim, in the order in which they were read."""
        return self._ledger.hexdigest()

    def as_json(self) -> dict[str, Any]:
        return {"batches": self.batches, "losses": self.losses, "grad_norms": self.grad_norms}


def batch_bytes(position: int, batch: Batch) -> bytes:
    """What a ledger hashes of a batch: its number, and its tokens and labels as 32-bit integers, little-endian."""
    words = [np.array([position, *batch.input_ids.shape])]
    words += [tensor.numpy() for tensor in (batch.input_ids, batch.labels)]
    return b"".join(word.astype("<i4").tobytes() for word in words)


class ChainWitness:
    """One training of one stage (`pretrain`, `sft` or `dpo`); `weights` are the checkpoints that it begins from, if it
    does not begin from nothing."""

    def __init__(self, recipe: Recipe, run: RunDirectory, stage: str, weights: Path | None = None) -> None:
        self._recipe, self._run, self._stage = recipe, run, stage
        self._place, self._weights = Place(run), weights
        self._directory = self._checkpoints = run.root
        self._chain: Chain | None = None
        self._state = self._members = self._inputs = ""
        self._trace = Trace()
        self._unstored: list[tuple[int, str]] = []  # step and claim of checkpoints that are being written
        self._guard_rows = 0

    def close(self) -> None:
        """Give the chain back; another process or stage may write it then."""
        if self._chain is not None:
            self._chain.close()

    def begin(self, processes: Processes, backend: Backend, directory: Path, checkpoints: Path) -> None:
        self.close()
        self._state, self._unstored = "", []
        self._directory, self._checkpoints = directory, checkpoints
        self._ranks = Ranks(processes.new_control_group())
        self._processes = processes.layout.world_size
        local_rank = processes.device.index or 0
        mine = {
            "rank": processes.rank,
            **inventory(backend, processes.device, local_rank),
            "code": package_digest(),
            "environment": environment_digest(),
        }
        members = self._ranks.gather(mine)
        self._on_first(lambda: self._admit(members))

    def restored(self, step: int, info: CheckpointInfo | None, arithmetic: str) -> None:
        self._on_first(lambda: self._go_on(step, info) if self._state else self._start(step, info, arithmetic))
        self._trace = Trace()

    def stepped(self, step: int, position: int, batch: Batch, loss: float, grad_norm: float) -> None:
        if self._ranks.is_coordinator:
            self._trace.add(position, batch, loss, grad_norm)

    def claim(self, step: int, cursor: DataCursor) -> dict[str, Any]:
        return dict(self._on_first(lambda: self._claim(step, cursor)))

    def settle(self) -> None:
        if not self._ranks.is_coordinator:
            return
        root = self._checkpoints
        newest = max(complete_steps(root), default=-1)
        for step, claim in list(self._unstored):
            digest = _manifest_with(claim, root / step_name(step))
            if digest is not None:
                self._open.append("saved", {"claim": claim, "manifest": digest})
            if digest is not None or step < newest:  # it failed, or is already retired
                self._unstored.remove((step, claim))

    @property
    def _open(self) -> Chain:
        assert self._chain is not None
        return self._chain

    def _on_first(self, act: Callable[[], Any]) -> Any:
        """What the first process finds, on all; or its error, on all."""
        told: list[Any] = [None, None]
        error: AnychipError | None = None
        if self._ranks.is_coordinator:
            try:
                told[0] = act()
            except AnychipError as caught:
                error = caught
                told[1] = caught.paragraph
        value, problem = self._ranks.broadcast(told)
        if error:
            raise error
        if problem:
            raise UnfitError(problem)
        return value

    def _admit(self, members: list[dict[str, Any]]) -> None:
        """Pin everything and judge who is there. Raises UnfitError."""
        inputs = pin_inputs(self._recipe, self._run, self._stage)
        findings = Findings()
        judge(inputs["policy"], members, findings)
        if findings.problems:
            raise UnfitError(
                " ".join(problem.what for problem in findings.problems[:8]),
                where="attest",
                do="Train on chips and in environments that the policy allows, or change attest in the recipe.",
            )
        if others := [member["rank"] for member in members if member["code"] != members[0]["code"]]:
            raise UnfitError(
                f"rank {others[0]} runs other code of anychip than rank 0.",
                where="attest",
                do="Install the same package on all hosts.",
            )
        self._chain = Chain(self._place.chain)
        self._inputs = keep(self._place.objects, inputs)
        self._members = keep(self._place.objects, {"ranks": members})
        linked = (link.body for link in self._chain.links if link.kind == "guard")
        self._guard_rows = sum(len(body["rows"]) for body in linked if body["stage"] == self._stage)

    def _start(self, step: int, info: CheckpointInfo | None, arithmetic: str) -> None:
        resumed = None if info is None else self._find_state(info)
        weights = None
        if info is None and self._weights is not None:
            newest = max(complete_steps(self._weights), default=0)
            weights = manifest_digest(self._weights / step_name(newest))
        body = {
            "stage": self._stage,
            "step": step,
            "resumed": resumed,
            "weights": weights,
            "inputs": self._inputs,
            "members": self._members,
            "processes": self._processes,
            "arithmetic": arithmetic,
        }
        me = self._open.append("start", body)
        self._state = resumed or me

    def _find_state(self, info: CheckpointInfo) -> str:
        """The link of the state that a checkpoint holds; links that are missing are added, and say so."""
        claim = info.extra.get("attest", {}).get("claim")
        manifest = manifest_digest(info.path)
        links = self._open.links
        for link in links:
            if link.kind == "derived" and link.body["manifest"] == manifest:
                return link.digest
        if (grown := self._grown(info)) is not None:
            return grown
        if any(link.digest == claim for link in links):
            stored = {(link.body["claim"], link.body["manifest"]) for link in links if link.kind == "saved"}
            if manifest is not None and (claim, manifest) not in stored:
                self._open.append("repair", {"why": "a process died after it stored a checkpoint", "step": info.step})
                self._open.append("saved", {"claim": claim, "manifest": manifest})
            return str(claim)
        if any(link.kind in ("start", "claim") and link.body["stage"] == self._stage for link in links):
            why = f"the checkpoint of step {info.step} of {self._stage} is of a state that was never claimed here"
            self._open.append("gap", {"why": why})
            return str(claim)
        how = {key: value for key, value in info.extra.items() if key not in _OWN_EXTRA}
        body = {"stage": self._stage, "step": info.step, "manifest": manifest, "how": "brought from elsewhere"}
        return self._open.append("derived", {**body, "parent": None, "said": how})

    def _grown(self, info: CheckpointInfo) -> str | None:
        """A link of the first checkpoint of a model that grew, to the state that it grew from; None for any other."""
        lineage = info.extra.get("lineage") or []
        if not lineage or lineage[-1]["step"] != info.step:
            return None
        before = self._run.model_checkpoints(self._recipe, len(lineage) - 1) / step_name(info.step)
        manifest = manifest_digest(before)
        saved = [link.body for link in self._open.links if link.kind == "saved"]
        claims = [body["claim"] for body in saved if body["manifest"] == manifest]
        body = {"stage": self._stage, "step": info.step, "manifest": manifest_digest(info.path), "how": "grown"}
        said = {"growth": sha256_json(lineage[-1])}
        return self._open.append("derived", {**body, "parent": claims[-1] if claims else None, "said": said})

    def _go_on(self, step: int, info: CheckpointInfo | None) -> None:
        """Training went back to an older state."""
        self._link_guard()
        self.settle()
        self._unstored.clear()
        if info is None:
            starts = [k for k in self._open.links if k.kind == "start" and k.body["stage"] == self._stage]
            to = next(k.digest for k in reversed(starts) if k.body["resumed"] is None)
        else:
            to = self._find_state(info)
        self._open.append("rollback", {"stage": self._stage, "to": to, "dropped": len(self._trace.batches)})
        self._state = to

    def _claim(self, step: int, cursor: DataCursor) -> dict[str, Any]:
        self._link_guard()
        trace, self._trace = self._trace, Trace()
        body = {
            "stage": self._stage,
            "parent": self._state,
            "from_step": step - len(trace.batches),
            "step": step,
            "skipped": cursor.as_json(),
            "ledger": trace.ledger,
            "trace": keep(self._place.objects, trace.as_json()),
            "members": self._members,
            "seconds": round(time.monotonic() - trace.started, 3),
        }
        self._state = self._open.append("claim", body)
        self._unstored.append((step, self._state))
        return {"claim": self._state, **body}

    def _link_guard(self) -> None:
        """What the guard did since it was last asked."""
        rows = self._read_guard()
        if new := rows[self._guard_rows :]:
            self._open.append("guard", {"stage": self._stage, "rows": new})
        self._guard_rows = len(rows)

    def _read_guard(self) -> list[Any]:
        path = self._directory / "logs" / GUARD_LOG
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                rows.append(json.loads(line, parse_constant=str))
            except ValueError:
                rows.append(line[:200])
        return rows


def manifest_digest(checkpoint: Path) -> str | None:
    """The digest of a checkpoint's manifest, as its marker says; None for one that is not complete."""
    try:
        return (checkpoint / MARKER_NAME).read_text(encoding="ascii").split()[-1]
    except (OSError, UnicodeDecodeError, IndexError):
        return None


def _manifest_with(claim: str, checkpoint: Path) -> str | None:
    """The digest of the manifest of a complete checkpoint that carries this claim; None: there is another one, or
    none yet."""
    try:
        text = (checkpoint / MANIFEST_NAME).read_bytes()
        complete = (checkpoint / MARKER_NAME).exists()
    except OSError:
        return None
    return hashlib.sha256(text).hexdigest() if complete and claim.encode() in text else None


_: type[Witness] = ChainWitness
