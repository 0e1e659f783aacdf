"""Computes randomly chosen steps again, from the checkpoints and data of a run, and compares them with its chain.

From a checkpoint that the chain names, training goes on to the chosen step exactly as it did, in this one process:
every batch must have the recorded tokens, every loss and gradient norm be the recorded one. With the same arithmetic
(layout, threads, micro-batches) they are the same bits; with another, sums round differently.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import Any

from anychip.attest.check.findings import Findings, Refused
from anychip.attest.check.history import History
from anychip.attest.pins import data_digests
from anychip.attest.witness import batch_bytes, manifest_digest
from anychip.chips.backend import detect_backend
from anychip.chips.operators import operators_for
from anychip.data.cursor import DataCursor
from anychip.data.loader import TrainingData
from anychip.errors import AnychipError, InputError
from anychip.parallel.parts import initialize_parts
from anychip.parallel.processes import Processes
from anychip.recipe import Recipe, parse_recipe
from anychip.recipe.schema import ParallelConfig
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointInfo, CheckpointStore
from anychip.train.checkpoint.directory import complete_steps, step_name
from anychip.train.engine import Engine
from anychip.train.guard import Guard, GuardState
from anychip.train.heartbeat import Heartbeat
from anychip.train.job import TrainingJob, training_job
from anychip.train.optimizer import Optimizer
from anychip.train.precision import compute_dtype
from anychip.train.schedule import lr_share
from anychip.train.step import train_step

# Relative differences that another order of sums explains, in training of some hundred steps from one state.
TOLERANCES = {"torch.float32": 1e-4, "torch.bfloat16": 2e-2}


@dataclass(frozen=True)
class Stretch:
    """Steps from a stored state to the claim after it."""

    begins: str
    ends: str
    claim: dict[str, Any]
    arithmetic: str
    inputs: str


def replay_steps(run: RunDirectory, history: History, count: int, seed: int | None, findings: Findings) -> None:
    """Replay `count` steps of the pretraining, chosen among those that a checkpoint here leads to, and add to the
    findings what came out. Other stages are not replayed."""
    stretches = _stretches(run, history)
    if not stretches:
        findings.problem("steps", "no step can be computed again: no checkpoint of this chain is in the run directory.")
        return
    chance = random.Random(seed)
    chosen: dict[int, set[int]] = {}
    steps = [(n, step) for n, s in enumerate(stretches) for step in range(s.claim["from_step"], s.claim["step"])]
    for number, step in chance.sample(steps, min(count, len(steps))):
        chosen.setdefault(number, set()).add(step)
    done = same = 0
    for number, wanted in sorted(chosen.items()):
        try:
            computed, bits = _replay(run, history, stretches[number], max(wanted), findings)
        except (AnychipError, Refused) as error:
            findings.problem("steps", f"a step could not be computed again: {error}")
            return
        done, same = done + computed, same + bits
    first, last = min(s.claim["from_step"] for s in stretches), max(s.claim["step"] for s in stretches)
    findings.shown.append(
        f"{sum(map(len, chosen.values()))} steps chosen at random among steps {first + 1} to {last} (and those before "
        f"them, {done} in all) were computed again from checkpoints and data: batches, losses and gradient norms are "
        f"those recorded, {same} of them to the last bit."
    )


def _stretches(run: RunDirectory, history: History) -> list[Stretch]:
    """What can be computed again here: claims that go on from a checkpoint on disk, or from the beginning."""
    if run.read_recipe().grow:
        raise InputError(
            "grew while it was trained, and steps of models that grow are not computed again.",
            where=run.root,
            do="Check the release without --replay.",
        )
    root = run.checkpoints
    stored = {manifest_digest(root / step_name(step)) for step in complete_steps(root)}
    there = {state for manifest, state in history.manifests.items() if manifest in stored}
    found, start = [], {"arithmetic": "", "inputs": ""}
    for digest, link in zip(history.digests, history.links, strict=True):
        body = link["body"]
        if link["kind"] == "start" and body["stage"] == "pretrain":
            start = body
            if body["resumed"] is None and body["weights"] is None:
                there.add(digest)
        elif link["kind"] == "claim" and body["stage"] == "pretrain" and body["parent"] in there:
            found.append(Stretch(body["parent"], digest, body, start["arithmetic"], start["inputs"]))
    return found


def _replay(run: RunDirectory, history: History, stretch: Stretch, last: int, findings: Findings) -> tuple[int, int]:
    """Go on from a stretch's state up to step `last` (from 0); how many steps, and how many gave the same bits."""
    inputs = history.lookup(stretch.inputs, "inputs")
    recipe = parse_recipe(inputs["recipe"], "the recipe in the chain")
    if data_digests(recipe, run, "pretrain") != inputs["data"]:
        raise InputError("its data is not the data that was pinned.", where=run.data)
    data = TrainingData(run, recipe)
    job, engine, optimizer, processes = _machine(recipe, run, data)
    guard, heartbeat = Guard(job.guard), Heartbeat.of_environment(0, 0, processes.device)
    _restore(run, history, stretch.begins, engine, optimizer, guard, recipe)
    claim, trace = stretch.claim, history.lookup(stretch.claim["trace"], "trace")
    cursor, ledger = DataCursor.of_json(claim["skipped"]), hashlib.sha256()
    tolerance = TOLERANCES.get(str(engine.parts[0].compute_dtype), 2e-2)
    same = 0
    for at, step in enumerate(range(claim["from_step"], last + 1)):
        position = cursor.position(step)
        batch = data.batch(position)
        ledger.update(batch_bytes(position, batch))
        lr = job.optimizer.lr * lr_share(job.optimizer.schedule, step, job.steps)
        engine.begin_step(step + 1)
        found = train_step(engine, optimizer, processes, batch, lr, job.optimizer.grad_clip, guard, heartbeat)
        for name, value, recorded in (
            ("loss", found.loss, trace["losses"][at]),
            ("gradient norm", found.grad_norm, trace["grad_norms"][at]),
        ):
            if not _near(value, recorded, tolerance):
                findings.problem(
                    "steps",
                    f"step {step + 1}, computed again, has {name} {value:.6g}; {recorded} was recorded.",
                )
        same += (found.loss, found.grad_norm) == (trace["losses"][at], trace["grad_norms"][at])
    if last + 1 == claim["step"] and ledger.hexdigest() != claim["ledger"]:
        findings.problem("data", f"the batches of steps {claim['from_step'] + 1} to {last + 1} are not those recorded.")
    if last + 1 == claim["step"]:
        _compare_weights(run, history, stretch, engine, tolerance, findings)
    return last + 1 - claim["from_step"], same


def _machine(recipe: Recipe, run: RunDirectory, data: TrainingData) -> tuple[TrainingJob, Engine, Optimizer, Processes]:
    """Model and optimizer of a recipe, in this one process."""
    backend = detect_backend()
    backend.prepare_process()
    device, dtype = backend.device(0), compute_dtype(recipe.training.compute_dtype, backend)
    job = training_job(recipe, run.root, data, lambda parameters: None, None, "")
    job = replace(job, parallel=ParallelConfig())
    processes = Processes.join(job.parallel, device, backend.collective_backend)
    operators = operators_for(backend.vendor, job.operators)
    engine = Engine(job, processes, dtype, operators)
    return job, engine, Optimizer(engine.trainable, job.optimizer, dtype, operators), processes


def _restore(
    run: RunDirectory,
    history: History,
    state: str,
    engine: Engine,
    optimizer: Optimizer,
    guard: Guard,
    recipe: Recipe,
) -> None:
    """Bring model, optimizer and guard into a state of the chain."""
    manifests = [manifest for manifest, held in history.manifests.items() if held == state]
    if not manifests:
        initialize_parts(engine.parameters, recipe.model, recipe.seed)
        optimizer.reset()
        return
    store, info = _open(run, history, state, manifests[0])
    guard.restore(GuardState.model_validate(info.extra.get("guard", {})))
    named = {f"model.{name}": parameter.detach() for name, parameter in engine.trainable.items()}
    named |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    if info.extra.get("weights_only", False):
        named = {name: value for name, value in named.items() if name.startswith("model.")}
        optimizer.reset()
    store.load(info, named)


def _open(run: RunDirectory, history: History, state: str, manifest: str) -> tuple[CheckpointStore, CheckpointInfo]:
    """The checkpoint of a state, verified whole."""
    store = CheckpointStore(run.checkpoints)
    info = store.open(history.states[state][1])
    if manifest_digest(info.path) != manifest:
        raise InputError("is another checkpoint than the chain names.", where=info.path)
    return store, info


def _compare_weights(
    run: RunDirectory, history: History, stretch: Stretch, engine: Engine, tolerance: float, findings: Findings
) -> None:
    """The weights at the end of a whole stretch are those of its checkpoint, where that is still there."""
    manifest = next((m for m, state in history.manifests.items() if state == stretch.ends), None)
    step = stretch.claim["step"]
    if manifest is None or manifest_digest(run.checkpoints / step_name(step)) != manifest:
        return
    store, info = _open(run, history, stretch.ends, manifest)
    for name, stored in store.read(info, [name for name in info.tensors if name.startswith("model.")]):
        computed = engine.parameters[name.removeprefix("model.")].detach().cpu().double()
        distance = float((computed - stored.double()).norm() / stored.double().norm().clamp_min(1e-12))
        if not distance <= tolerance:
            findings.problem(
                "weights", f"{name} of step {step}, computed again, differs by {distance:.1e} of its norm."
            )


def _near(value: float, recorded: Any, tolerance: float) -> bool:
    if not isinstance(recorded, float | int):  # a number that was none
        return str(value) == str(recorded)
    return abs(value - recorded) <= tolerance * max(abs(recorded), 1e-6)
