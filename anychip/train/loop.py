"""The training loop. Read `run_training` top to bottom; everything it calls is one idea.

A step is: take the global batch of this step, run its micro-batches forward and backward, add up gradients over
processes, check them, clip, update. What a step does depends on (recipe, seed, step) and the weights alone, so a run
that was stopped or killed continues bit for bit.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Literal

from anychip import alive
from anychip.chips.backend import Backend, detect_backend, measure_matmul_flops
from anychip.chips.operators import OperatorFallback, operators_for
from anychip.chips.profile import choices
from anychip.data.batch import Batch
from anychip.data.cursor import DataCursor
from anychip.errors import AnychipError
from anychip.model.arithmetic import flops_per_token
from anychip.parallel.processes import Processes
from anychip.progress import Progress, progress
from anychip.rundir import RunDirectory
from anychip.train.copies import Copies
from anychip.train.damaged_data import DamagedData
from anychip.train.engine import Engine
from anychip.train.fence import fence
from anychip.train.guard import LOG_NAME as GUARD_LOG
from anychip.train.guard import BadSteps, Guard
from anychip.train.heartbeat import FOLDER_VARIABLE, Heartbeat
from anychip.train.job import TrainingJob
from anychip.train.metrics import MetricsLog, StepMetrics
from anychip.train.optimizer import Optimizer
from anychip.train.output import print_what_fits, where_there_is_room
from anychip.train.precision import compute_dtype
from anychip.train.replay import Replay
from anychip.train.saves import Saves
from anychip.train.step import Checks, Growth, StepResult, train_step


class Stopped(AnychipError):
    """A signal asked the run to stop; it saved its state first."""

    exit_code = 130


@dataclass
class _Clock:
    """What has passed since the last log line."""

    started: float
    step: int
    tokens: int = 0
    data_seconds: float = 0.0


def run_training(job: TrainingJob) -> int:
    """Train until `job.end`, from the newest good checkpoint if there is one. Returns the last step.

    Raises Stopped after SIGINT or SIGTERM (state saved), UnfitError when the guard stops it, InputError when a
    checkpoint belongs to another recipe.
    """
    started = time.perf_counter()
    if FOLDER_VARIABLE in os.environ:  # supervised: what is printed goes to a file
        print_what_fits()
    heartbeat = Heartbeat.of_environment(step=job.growing.grown_at if job.growing else 0)
    heartbeat.beat("start")
    backend = detect_backend()
    backend.set_deterministic(job.deterministic)
    processes, dtype = Processes.join_here(job.parallel), compute_dtype(job.compute_dtype, backend)
    heartbeat.placed(processes.place.pipeline, processes.device)
    if job.witness:
        job.witness.begin(processes, backend, job.directory, job.checkpoint_root)
    joined = time.perf_counter()
    if not processes.is_first:
        warnings.simplefilter("ignore", OperatorFallback)  # one process of thousands says it
    operators = operators_for(backend.vendor, choices(job.profile, backend.vendor, job.operators))
    engine = Engine(job, processes, dtype, operators)
    lr_scale = job.growing.lr_scale() if job.growing else {}
    optimizer = Optimizer(engine.trainable, job.optimizer, dtype, operators, lr_scale)
    new_parts = job.growing.bind(engine.trainable, optimizer) if job.growing else None
    built = time.perf_counter()
    guard = Guard(job.guard)
    saves = Saves(job, engine, optimizer, guard, processes)
    with heartbeat.listening(processes.layout.describe()):
        step, cursor = saves.restore()
        saves.prepare()
    heartbeat.beat("start")
    if step >= job.end:
        saves.leave()
        heartbeat.close()
        return step

    job.observer.attach(job, engine, processes)
    is_writer = processes.is_first
    if is_writer:
        _remember(cursor, job)
        restored = time.perf_counter()
        print(
            f"start: {processes.layout.describe()} | processes {joined - started:.1f} s | "
            f"model {built - joined:.1f} s | weights {restored - built:.1f} s",
            flush=True,
        )
    board = job.directory / "tb" if job.log.tensorboard else None
    log = MetricsLog(job.directory / "logs", board, step) if is_writer else None
    bad_steps = BadSteps(job.guard, job.directory / "logs" / GUARD_LOG, writes=is_writer)
    damaged = DamagedData(job, bad_steps, processes)
    beat = partial(heartbeat.beat, "forward_backward")
    replay = Replay(job.guard, job.identity, engine, processes, beat) if job.guard.replay_interval else None
    copies = Copies(saves.state, processes) if job.guard.digest_interval or replay else None
    peak = measure_matmul_flops(processes.device, dtype) if is_writer else None
    with (
        heartbeat.listening(processes.layout.describe()),
        _stop_requests() as stop,
        _Prefetch(job, step, cursor) as batches,
        _bar(job, processes) as bar,
    ):
        bar.advance(step)
        clock = _Clock(time.perf_counter(), step)
        if job.growing and step == job.growing.grown_at:
            _evaluate(job, engine, step, log, heartbeat, clock, "after growth")
        while step < job.end:
            heartbeat.begin_step(step + 1)
            waited = time.perf_counter()
            batch = damaged.checked(partial(batches.get, step), step + 1, cursor.position(step))
            if batch is None:
                cursor = cursor.without(cursor.position(step), cursor.position(step) + 1)
                if is_writer:
                    _remember(cursor, job)
                batches.restart(step, cursor)
                continue
            clock.data_seconds += time.perf_counter() - waited
            measured: Mapping[str, float] = {}
            if job.answering is not None:
                heartbeat.beat("answer")
                batch, measured = job.answering.answer(engine, batch, cursor.position(step))
            clock.tokens += batch.input_ids.numel()
            lr = job.rate(step)
            step += 1
            growth = Growth(new_parts, step) if new_parts else None
            checks = Checks(
                partial(replay.forward_backward, step) if replay and replay.due(step) else None,
                copies.flipped if copies else None,
            )
            job.observer.begin(step, lr)
            engine.begin_step(step)
            done = train_step(
                engine,
                optimizer,
                processes,
                batch,
                lr,
                job.optimizer.grad_clip,
                guard,
                heartbeat,
                checks,
                job.observer,
                growth,
            )
            fence().check_lease()
            bar.advance()
            heartbeat.beat("log")
            verdict = _compare(copies, bad_steps, step, processes) if done.problem else "equal"
            if done.fault and verdict == "equal":
                verdict = bad_steps.fault(step, done.fault, processes.rank)
            elif done.passing:
                bad_steps.passed(step, done.passing)
            if verdict == "recompute":  # a wrong bit, not the data, made the step bad
                step -= 1
                bar.advance(-1)
                batches.restart(step, cursor)
                continue
            if done.problem and verdict == "equal":
                position = cursor.position(step - 1)
                documents = job.source.documents(position) if is_writer else []
                found = done.problem, done.bad_tensor, documents
                if bad_steps.react(step, position, *found, guard.bad_in_a_row) == "rollback":
                    bar.advance(-step)
                    step, cursor = saves.restore()
                    cursor = cursor.without(cursor.position(step), position + 1)
                    clock = _go_on_from(job, step, cursor, log, batches, bar)
                    continue
                if new_parts:
                    new_parts.skip(step)
            if job.witness:
                job.witness.stepped(step, cursor.position(step - 1), batch, done.loss, done.grad_norm)

            shown = not done.problem and (step % job.log.interval == 0 or step in (1, job.end))
            experts = engine.balance.measure() if shown else {}
            if log and shown:
                backend.synchronize()
                metrics = replace(
                    _measure(job, backend, clock, step, done, lr, processes.layout.world_size, peak, measured),
                    experts=experts,
                )
                print(metrics.line(job.steps), flush=True)
                log.write_step(metrics)
                clock = _Clock(time.perf_counter(), step)
            if step == job.end or (job.eval_interval and step % job.eval_interval == 0):
                _evaluate(job, engine, step, log, heartbeat, clock)
            stopping = processes.any(stop.requested)
            leaving = stopping or step == job.end
            due = saves.due(step, leaving)
            interval = job.guard.digest_interval
            if copies and interval and verdict == "equal" and (due or step % interval == 0):
                heartbeat.beat("check")
                verdict = _compare(copies, bad_steps, step, processes)
                copies.watch(verdict == "equal")
            if verdict == "reload":
                bar.advance(-step)
                step, cursor = saves.restore()
                clock = _go_on_from(job, step, cursor, log, batches, bar)
                continue
            if log:
                log.catch_up()
            if due:
                heartbeat.beat("save")
                saves.save(step, cursor, last=leaving)
            if leaving:
                stop.over = stopping
                break
    heartbeat.beat("leave")
    processes.barrier()
    saves.leave()
    heartbeat.close()
    if log:
        log.close()
    if stop.over and step < job.steps:
        raise Stopped(f"Stopped at step {step} of {job.steps}, which is saved.", do="Run it again to continue.")
    return step


def _bar(job: TrainingJob, processes: Processes) -> AbstractContextManager[Progress]:
    return progress(job.title, job.steps, "steps", quiet=not processes.is_first)


def _evaluate(
    job: TrainingJob,
    engine: Engine,
    step: int,
    log: MetricsLog | None,
    heartbeat: Heartbeat,
    clock: _Clock,
    when: str = "",
) -> None:
    """Print and log what `job.evaluate` measures; its time is not the training's."""
    if job.evaluate is None:
        return
    heartbeat.beat("evaluate")
    started = time.perf_counter()

    def score(batch: Batch) -> float:
        loss = engine.score(batch)
        alive.progressed()
        return loss

    values = job.evaluate(score)
    if log:
        named = (f"{name} {value:.4f}" for name, value in values.items())
        print(" | ".join([f"step {step}/{job.steps}{when and f' {when}'}", *named]), flush=True)
        log.write({"step": step, **({"when": when} if when else {}), **values})
    clock.started += time.perf_counter() - started


def _compare(
    copies: Copies | None, bad_steps: BadSteps, step: int, processes: Processes
) -> Literal["equal", "recompute", "reload"]:
    """Compare and heal all copies; the worst that any process found, the same on all."""
    if copies is None:
        return "equal"
    differences = copies.compare()
    if processes.any(bad_steps.heal(step, differences, processes.rank)):
        bad_steps.go_back(differences)
        return "reload"
    return "recompute" if processes.any(bool(differences)) else "equal"


def _remember(cursor: DataCursor, job: TrainingJob) -> None:
    """For readers of the ledger; checkpoints keep the cursor too."""
    with where_there_is_room("which batches are left out"):
        cursor.write(RunDirectory(job.directory))


def _go_on_from(
    job: TrainingJob, step: int, cursor: DataCursor, log: MetricsLog | None, batches: _Prefetch, bar: Progress
) -> _Clock:
    """Everything but the state is at `step` again."""
    if log:
        _remember(cursor, job)
        log.forget_after(step)
    batches.restart(step, cursor)
    bar.advance(step)
    return _Clock(time.perf_counter(), step)


def _measure(
    job: TrainingJob,
    backend: Backend,
    clock: _Clock,
    step: int,
    done: StepResult,
    lr: float,
    devices: int,
    peak: float | None,
    measured: Mapping[str, float],
) -> StepMetrics:
    seconds = time.perf_counter() - clock.started
    rate = clock.tokens / seconds / devices
    mean_length = clock.tokens / (step - clock.step) / job.global_batch_size
    flops = rate * flops_per_token(job.model, round(mean_length)).model
    return StepMetrics(
        step=step,
        loss=done.loss,
        grad_norm=done.grad_norm,
        lr=lr,
        tokens=step * job.global_batch_size * job.seq_length,
        memory_bytes=backend.peak_memory_bytes(),
        tokens_per_second=rate,
        tflops=flops / 1e12,
        mfu=flops / peak if peak else None,
        data_share=clock.data_seconds / seconds,
        seconds=seconds,
        eta_seconds=(job.steps - step) * seconds / (step - clock.step),
        predicted=job.predicted,
        measured=measured,
    )


class _Prefetch:
    """Prepares the next step's batch while this one trains."""

    def __init__(self, job: TrainingJob, step: int, cursor: DataCursor) -> None:
        self._job = job
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.restart(step, cursor)

    def restart(self, step: int, cursor: DataCursor) -> None:
        """Go on with another step than the next, or with other batches."""
        self._cursor = cursor
        self._next: Future[Batch] = self._pool.submit(self._job.source.batch, cursor.position(step))

    def get(self, step: int) -> Batch:
        batch = self._next.result()
        if step + 1 < self._job.steps:
            self._next = self._pool.submit(self._job.source.batch, self._cursor.position(step + 1))
        return batch

    def __enter__(self) -> _Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass
class _Stop:
    """`over`: the state of all processes is saved, because one was asked to stop."""

    requested: bool = False
    over: bool = False


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks to stop after this step; a second one acts at once. Not so under a supervisor:
    it passes on what may have reached this process too, and ends by itself, with SIGKILL, who is to end at once."""
    stop, previous = _Stop(), {}
    supervised = FOLDER_VARIABLE in os.environ

    def request(number: int, frame: FrameType | None) -> None:
        if stop.requested and supervised:
            return
        if stop.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.requested = True
        print("stopping after this step; the state will be saved", file=sys.stderr, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, request)
        except ValueError:  # not the main thread: the caller handles signals
            break
    try:
        yield stop
    finally:
        for number, handler in previous.items():  # what is passed on late must not end a process that leaves
            signal.signal(number, signal.SIG_IGN if supervised and stop.over else handler)
