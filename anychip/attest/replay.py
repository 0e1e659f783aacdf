"""Computes randomly chosen steps again, from the checkpoints and data of a run, and compares them with its chain.

From a checkpoint that the chain names, training goes on to the chosen step exactly as it did: every batch must have the
recorded tokens, every loss and gradient norm be the recorded one. With the same arithmetic (layout, threads,
micro-batches) they are the same bits; with another, sums round differently.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.attest.check.findings import Findings, Problem
from anychip.attest.check.history import History
from anychip.attest.pins import data_digests
from anychip.attest.retrain import STAGES, Retraining, opened, parallel
from anychip.attest.witness import batch_bytes, manifest_digest
from anychip.data.cursor import DataCursor
from anychip.errors import AnychipError, InputError
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local
from anychip.recipe import Recipe, parse_recipe
from anychip.rundir import RunDirectory, stage_before
from anychip.train.checkpoint import CheckpointStore
from anychip.train.checkpoint.directory import complete_steps, step_name
from anychip.train.checkpoint.ranks import Ranks
from anychip.tune.adapters import adapter_directory

# Relative differences that another order of sums explains, in training of some hundred steps from one state.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Stretch:
    """Steps from a state to the claim after it; `checkpoint` holds that state, None is the beginning of the stage."""

    begins: str
    ends: str
    claim: dict[str, Any]
    start: dict[str, Any]
    checkpoint: Path | None

    @property
    def stage(self) -> str:
        return str(self.claim["stage"])

    @property
    def steps(self) -> range:
        return range(self.claim["from_step"], self.claim["step"])


@dataclass
class _Outcome:
    """Over all stretches: steps computed, those of the same bits, and in words where the arithmetic was another."""

    done: int = 0
    same: int = 0
    otherwise: dict[str, None] = field(default_factory=dict)


def replay_steps(run: RunDirectory, history: History, count: int, seed: int | None, findings: Findings) -> None:
    """Replay `count` steps, chosen among those that a checkpoint here leads to, and add to the findings what came out.

    All processes of a job call it together and find the same. Stages other than STAGES are not replayed.
    """
    stretches = list(_stretches(run, history))
    if not stretches:
        findings.problem("steps", "no step can be computed again: no checkpoint of this chain is in the run directory.")
        return
    chance = random.Random(_shared_seed(run, seed))
    steps = [(number, step) for number, stretch in enumerate(stretches) for step in stretch.steps]
    chosen: dict[int, int] = {}
    sample = chance.sample(steps, min(count, len(steps)))
    for number, step in sorted(sample):
        chosen[number] = step  # the last one of its stretch
    outcome = _Outcome()
    for number, last in chosen.items():
        try:
            _replay(run, history, stretches[number], last, findings, outcome)
        except (AnychipError, Problem) as error:
            findings.problem("steps", f"a step could not be computed again: {error}")
            return
    findings.shown.append(
        f"{len(sample)} steps chosen at random among {_ranges(stretches)} (and those before them, {outcome.done} in "
        "all) were computed again from checkpoints and data: batches, losses and gradient norms are those recorded, "
        f"{outcome.same} of them to the last bit."
    )
    findings.not_shown += outcome.otherwise
    others = {link["body"]["stage"] for link in history.links if link["kind"] == "claim"} - set(STAGES)
    findings.not_shown += [
        f"That the steps of {stage} were made so: they cannot be computed again." for stage in others
    ]


def _ranges(stretches: list[Stretch]) -> str:
    """The steps of each stage that may be chosen, from 1."""
    of_stage: dict[str, list[range]] = {}
    for stretch in stretches:
        of_stage.setdefault(stretch.stage, []).append(stretch.steps)
    return ", ".join(
        f"steps {min(r.start for r in ranges) + 1} to {max(r.stop for r in ranges)} of {stage}"
        for stage, ranges in of_stage.items()
    )


def _shared_seed(run: RunDirectory, seed: int | None) -> int:
    """The first process's, on all."""
    processes = Processes.join_here(parallel(run.read_recipe()))
    drawn = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    return int(Ranks(processes.new_control_group()).broadcast(drawn))


def _stretches(run: RunDirectory, history: History) -> Iterator[Stretch]:
    """What can be computed again here: claims that go on from a checkpoint on disk, or from the beginning of a stage
    whose first weights are there."""
    recipe = run.read_recipe()
    stored, weights_before = _stored(run, recipe), {stage: _weights_before(run, recipe, stage) for stage in STAGES}
    there: dict[str, Path | None] = {s: stored[m] for m, s in history.manifests.items() if m in stored}
    start: dict[str, Any] = {}
    first_weights: dict[str, str | None] = {}
    for digest, link in zip(history.digests, history.links, strict=True):
        body = link["body"]
        if link["kind"] == "start":
            start = body
            if body.get("resumed") is None:
                there[digest] = None
                first_weights[body["stage"]] = body.get("weights")
        elif link["kind"] == "claim" and body["stage"] in STAGES and body["parent"] in there:
            stage = body["stage"]
            if first_weights.get(stage) == weights_before[stage]:
                yield Stretch(body["parent"], digest, body, start, there[body["parent"]])


def _stored(run: RunDirectory, recipe: Recipe) -> dict[str, Path]:
    """Complete checkpoints of the run by the digest of their manifest."""
    roots = [run.model_checkpoints(recipe, number) for number in range(len(recipe.models))]
    for stage in STAGES[1:]:
        roots += [run.stage_checkpoints(stage), adapter_directory(run.root / stage) / "checkpoints"]
    paths = [root / step_name(step) for root in roots for step in complete_steps(root)]
    return {digest: path for path in paths if (digest := manifest_digest(path)) is not None}


def _weights_before(run: RunDirectory, recipe: Recipe, stage: str) -> str | None:
    """The digest of the weights that a stage would begin with if it began now; None for the first stage."""
    if stage == "pretrain":
        return None
    root = run.stage_checkpoints(stage_before(recipe, stage))
    return manifest_digest(root / step_name(max(complete_steps(root), default=0)))


def _replay(
    run: RunDirectory, history: History, stretch: Stretch, last: int, findings: Findings, outcome: _Outcome
) -> None:
    """Go on from a stretch's state up to step `last` (from 0)."""
    inputs = history.lookup(stretch.start["inputs"], "inputs")
    recipe = parse_recipe(inputs["recipe"], "the recipe in the chain")
    if data_digests(recipe, run, stretch.stage) != inputs["data"]:
        raise InputError("its data is not the data that was pinned.", where=run.data)
    training = Retraining.of(recipe, run, stretch.stage, _growths_behind(history, stretch.begins))
    training.restore(stretch.checkpoint, _manifest_of(history, stretch.begins))
    dtype = training.engine.parts[0].compute_dtype
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
    if (arithmetic := stretch.start["arithmetic"]) != (own := training.engine.arithmetic):
        text = f"That the last bits are right: {stretch.stage} was trained by {arithmetic}, and computed again by {own}"
        outcome.otherwise[f"{text}; numbers that differ by less than {tolerance:g} were taken for the same."] = None
    claim, trace = stretch.claim, history.lookup(stretch.claim["trace"], "trace")
    cursor, ledger = DataCursor.of_json(claim["skipped"]), hashlib.sha256()
    for at, step in enumerate(range(claim["from_step"], last + 1)):
        position = cursor.position(step)
        batch = training.job.source.batch(position)
        ledger.update(batch_bytes(position, batch))
        found = training.step(step, batch)
        recorded = trace["losses"][at], trace["grad_norms"][at]
        pairs = zip(("loss", "gradient norm"), (found.loss, found.grad_norm), recorded, strict=True)
        for name, value, right in pairs:
            if not _near(value, right, tolerance):
                what = f"step {step + 1} of {stretch.stage}, computed again, has {name} {value:.6g}; {right}"
                findings.problem("steps", f"{what} was recorded.")
        outcome.done += 1
        outcome.same += (found.loss, found.grad_norm) == recorded
    if last + 1 == claim["step"]:
        if ledger.hexdigest() != claim["ledger"]:
            steps = f"steps {claim['from_step'] + 1} to {last + 1}"
            findings.problem("data", f"the batches of {steps} of {stretch.stage} are not those recorded.")
        _compare_weights(run, recipe, history, stretch, training, tolerance, findings)


def _growths_behind(history: History, state: str) -> int:
    """How often the model of a state had grown."""
    links = dict(zip(history.digests, history.links, strict=True))
    bodies = [links[earlier]["body"] for earlier in history.lineage(state) if links[earlier]["kind"] == "derived"]
    return sum(body["how"] == "grown" for body in bodies)


def _manifest_of(history: History, state: str) -> str:
    return next((manifest for manifest, held in history.manifests.items() if held == state), "")


def _compare_weights(
    run: RunDirectory,
    recipe: Recipe,
    history: History,
    stretch: Stretch,
    training: Retraining,
    tolerance: float,
    findings: Findings,
) -> None:
    """The weights at the end of a whole stretch are those of its checkpoint, where that is still there."""
    manifest = _manifest_of(history, stretch.ends)
    if (path := _stored(run, recipe).get(manifest)) is None:
        return
    info, computed = opened(path, manifest), training.weights()
    kept = {name: torch.empty_like(value) for name, value in computed.items()}
    CheckpointStore(path.parent).load(info, kept, part=training.engine.pipelined)
    names = sorted(name for name in info.tensors if name.startswith("model."))
    squares = torch.zeros(len(names), 2, device=training.processes.device)  # of the difference, of what was kept
    for row, name in zip(squares, names, strict=True):
        if name in kept:
            row += _squares(local(computed[name]), local(kept[name])).to(row)
    for name, (off, whole) in zip(names, training.processes.sum(squares).tolist(), strict=True):
        distance = (off / max(whole, 1e-24)) ** 0.5
        if not distance <= tolerance:
            what = f"{name} of step {stretch.claim['step']} of {stretch.stage}, computed again"
            findings.problem("weights", f"{what}, differs by {distance:.1e} of its norm.")


def _squares(computed: Tensor, kept: Tensor) -> Tensor:
    return torch.stack(((computed - kept).square().sum(), kept.square().sum()))


def _near(value: float, recorded: Any, tolerance: float) -> bool:
    if not isinstance(recorded, float | int):  # a number that was none
        return str(value) == str(recorded)
    return abs(value - recorded) <= tolerance * max(abs(recorded), 1e-6)
