"""A run in sentences: how far it came, what went wrong, who is slow, and what to do now.

Everything is read as it was left, torn lines and all, by whoever was killed while writing it.
"""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from anychip.rundir import TUNING_STAGES, RunDirectory
from anychip.supervise.decide import STRIKE_SECONDS, STRIKES
from anychip.supervise.incidents import LOG_NAME, Incident, read_incidents
from anychip.supervise.left import is_cut, modified, rows_of, tail, written
from anychip.supervise.processes import generation_number, heartbeat_folders
from anychip.supervise.record import quarantined
from anychip.supervise.watch import Beat, describe_last, process_state, read_beat
from anychip.train.checkpoint.directory import complete_steps
from anychip.train.heartbeat_page import read_message

_SHOWN = 5
_JUDGED = ("skip", "rollback", "stop")  # what the guard does after a step that it judged bad
_AGAIN = "Start it again: it goes on from the newest good checkpoint."
_CONSEQUENCES = ("Connection reset", "Connection closed", "Connection refused", "connectFullMesh", "Broken pipe")


def explain(run: RunDirectory) -> str:
    """Text for a person. Raises InputError when `run` is no run directory."""
    steps = run.read_recipe().training.steps
    if _is_done(run, "train"):
        ended, (stages, advice) = f"{run.root}: training ended at step {steps} of {steps}.", _stages(run)
        return "\n".join([ended, *_history(run), *stages, f"What to do: {advice}" if advice else "Nothing to do."])
    incidents = read_incidents(run.logs / LOG_NAME)
    parts = [_progress(run), *_processes(run, incidents), *_history(run)]
    return "\n".join([*parts, f"What to do: {_advice(run, incidents)}"])


def _is_done(run: RunDirectory, stage: str) -> bool:
    try:
        return run.finished(stage) is not None
    except (OSError, ValueError):  # a torn marker is none
        return False


def _progress(run: RunDirectory) -> str:
    return f"{run.root}: training is not done; {_reached(run.checkpoints, run.logs)}."


def _reached(checkpoints: Path, logs: Path) -> str:
    saved, path, step = complete_steps(checkpoints), logs / "metrics.jsonl", _logged_step(logs)
    newest = f"the newest checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint"
    return f"{newest}; {f'the log ends at step {step} ({written(path)})' if step else 'no log'}"


def _logged_step(logs: Path) -> int:
    steps = [row["step"] for row in rows_of(logs / "metrics.jsonl") if isinstance(row.get("step"), int)]
    return steps[-1] if steps else 0


def _stages(run: RunDirectory) -> tuple[list[str], str]:
    """What the tuning stages left that began and did not end, and what to do about the first of them; "": nothing."""
    text, advice = [], ""
    for stage in TUNING_STAGES:
        folders = [folder for folder in (run.root / stage / "adapter", run.root / stage) if (folder / "logs").is_dir()]
        if _is_done(run, stage) or not folders:
            continue
        logs = folders[0] / "logs"
        stop = _stop_of_guard(logs)
        why = f" was stopped by the guard in step {stop.get('step')}, {stop.get('problem')}" if stop else " is not done"
        text += [f"The stage {stage}{why}; {_reached(folders[0] / 'checkpoints', logs)}.", *_guard(logs)]
        again = f"run `anychip {stage} RECIPE` again"
        other = f"with a lower tune.{stage}.optimizer.lr or guard.on_bad_step=rollback"
        advice = advice or (f"look at the documents above; {again}, {other}." if stop else f"{again}: it goes on.")
    return text, advice


def _stop_of_guard(logs: Path) -> dict[str, Any]:
    """The guard's line on the bad step that ended training, if nothing was trained after it."""
    rows = rows_of(logs / "guard.jsonl")
    last = rows[-1] if rows else {}
    step = last.get("step")
    went_on = isinstance(step, int) and _logged_step(logs) > step
    return last if last.get("action") == "stop" and not went_on else {}


def _history(run: RunDirectory) -> list[str]:
    incidents = read_incidents(run.logs / LOG_NAME)
    slow = [incident for incident in incidents if incident.kind == "slow"]
    ends = [incident for incident in incidents if incident.kind != "slow"]
    return [*_incidents(ends), *_slow(slow), *_left_out(run), *_guard(run.logs)]


def _processes(run: RunDirectory, incidents: Sequence[Incident]) -> list[str]:
    """What the newest generation's processes are doing, or what they left."""
    folders = heartbeat_folders(run)
    paths = [path for path in sorted(folders[-1].glob("rank-*")) if not path.suffix] if folders else []
    beats = {path: beat for path in paths if (beat := read_beat(path)) is not None}
    torn = sum(path not in beats and not _is_blank(path) for path in paths)
    unread = [f"{torn} of {len(paths)} heartbeats in {folders[-1]} cannot be read."] if torn else []
    if not beats:
        return unread + (_ranks_logs(run) if not incidents else [])
    return unread + _known_processes(run, incidents, folders[-1], beats)


def _known_processes(
    run: RunDirectory, incidents: Sequence[Incident], folder: Path, beats: dict[Path, Beat]
) -> list[str]:
    alive = [beat for beat in beats.values() if _is_alive(beat)]
    if alive:
        return [_living(alive, len(beats))]
    number = generation_number(folder)
    if any(incident.kind != "slow" and incident.generation == number for incident in incidents):
        return []  # how it ended was written down
    if all(beat.node not in ("", platform.node()) for beat in beats.values()):
        nodes = ", ".join(sorted({beat.node for beat in beats.values()})[:_SHOWN])
        return [f"Its processes are those of {nodes}, not of this host; {_last_word(beats)}."]
    return [_unwatched_end(beats), *_ranks_logs(run)]


def _is_blank(path: Path) -> bool:
    """Whether its process has not said anything yet."""
    try:
        return not path.read_bytes().strip()
    except OSError:
        return False


def _living(alive: Sequence[Beat], of: int) -> str:
    behind = min(alive, key=lambda beat: (beat.step, beat.at))
    silent = time.monotonic() - max(beat.at for beat in alive)
    return (
        f"{len(alive)} of {of} processes are alive here; the furthest behind is rank {behind.rank} in step "
        f"{behind.step}, {behind.phase}; the last word came {silent:.0f} s ago."
    )


def _unwatched_end(beats: dict[Path, Beat]) -> str:
    """All are gone and nobody wrote why: whoever watches them was killed too, or the host went down."""
    path = min(beats, key=lambda path: (beats[path].step, beats[path].rank))
    behind, collective = beats[path], describe_last(read_message(path.with_suffix(".work")))
    return (
        f"No process of it is alive here, and nobody wrote down why: whoever watched was killed as well, or the host "
        f"went down; {_last_word(beats)}. The furthest behind was rank {behind.rank}{_on(behind)} in step "
        f"{behind.step}, {behind.phase}" + (f"; its last collective: {collective}." if collective else ".")
    )


def _last_word(beats: dict[Path, Beat]) -> str:
    path = max(beats, key=modified)
    last = beats[path]
    return f"the last word is of {written(path)}: rank {last.rank}{_on(last)} in step {last.step}, {last.phase}"


def _on(beat: Beat) -> str:
    return f" on {beat.node}" if beat.node else ""


def _is_alive(beat: Beat) -> bool:
    """Whether the process that beat is there still, and not a later one of the same number."""
    if beat.node not in ("", platform.node()) or process_state(beat.pid) in ("", "Z"):
        return False
    try:
        return b"anychip" in Path(f"/proc/{beat.pid}/cmdline").read_bytes()
    except OSError:
        return False


def _ranks_logs(run: RunDirectory) -> list[str]:
    """The last error that a process wrote for itself, rather than for the loss of a fellow."""
    last = [(path, line) for path in sorted((run.logs / "ranks").glob("rank-*.log")) if (line := _last_error(path))]
    causes = [(path, line) for path, line in last if not any(word in line for word in _CONSEQUENCES)]
    if not last:
        return []
    path, line = (causes or last)[0]
    return [f"{path.stem.replace('-', ' ', 1)} wrote last ({written(path)}): {line}"]


def _last_error(path: Path) -> str:
    """The last line that names an error."""
    lines = [line.strip() for line in tail(path).splitlines()]
    found = [line for line in lines if "Error" in line or line.startswith("anychip: ")]
    return found[-1][:400] if found else ""


def _incidents(incidents: Sequence[Incident]) -> list[str]:
    if not incidents:
        return ["No incident was recorded."]
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(i.kind for i in incidents).most_common())
    shown = [f"  {incident.sentence()}" for incident in incidents[-_SHOWN:]]
    lines = [f"{len(incidents)} incidents ({kinds}); the last:", *shown]
    stack = incidents[-1].stack
    return [*lines, "  It was here:", *(f"    {frame}" for frame in stack[:6])] if stack else lines


def _slow(found: Sequence[Incident]) -> list[str]:
    """The newest finding about each process that was slow."""
    newest = {(incident.node, incident.rank): incident for incident in found}
    return [f"Slow: {incident.sentence()}" for incident in list(newest.values())[-_SHOWN:]]


def _left_out(run: RunDirectory) -> list[str]:
    return [f"{name} is in quarantine: {why}." for name, why in quarantined(run).items()]


def _guard(logs: Path) -> list[str]:
    """Bad steps, then what else it wrote down: damaged data, and faults of chips and memory."""
    path = logs / "guard.jsonl"
    rows, at_least = rows_of(path), "at least " if is_cut(path) else ""
    judged = [row for row in rows if row.get("action") in _JUDGED]
    others = [row for row in rows if row.get("action") not in _JUDGED]
    lines = []
    if judged:
        last, documents = judged[-1], judged[-1].get("documents")
        lines.append(f"Steps judged bad: {at_least}{len(judged)}; the last: {_step_and_problem(last)}.")
        if isinstance(documents, list) and documents:
            lines.append(f"  Its documents: {', '.join(map(str, documents[:_SHOWN]))}")
    if others:
        lines.append(
            f"Other findings of the guard: {at_least}{len(others)}; the last: {_step_and_problem(others[-1])}."
        )
    return lines


def _step_and_problem(row: dict[str, Any]) -> str:
    return f"step {row.get('step')}, {row.get('problem')}"


def _advice(run: RunDirectory, incidents: Sequence[Incident]) -> str:
    ends = [incident for incident in incidents if incident.kind != "slow"]
    worst = Counter((i.node, i.rank) for i in _last_failures(ends)).most_common(1)
    if worst and worst[0][1] >= STRIKES:
        (node, rank), count = worst[0]
        return f"rank {rank} on {node} failed {count} times: take its chip out and run `anychip doctor` there."
    if ends and (advise := _ADVICE.get(ends[-1].kind)):
        return advise(ends[-1])
    slow = [incident for incident in incidents if incident.kind == "slow"]
    if slow and not ends:
        return f"look at {slow[-1].node}: `anychip doctor`, its clock and temperature, what else runs there. {_AGAIN}"
    if _stop_of_guard(run.logs):
        return "look at the documents above; start again with a lower learning rate or guard.on_bad_step=rollback."
    return _AGAIN


def _last_failures(ends: Sequence[Incident]) -> list[Incident]:
    """Crashes and hangs of the minutes up to the last incident, if that is one of them."""
    failures = [incident for incident in ends if incident.kind in ("crash", "hang")]
    if not failures or failures[-1] is not ends[-1]:
        return []
    return [incident for incident in failures if abs(_at(ends[-1]) - _at(incident)) < STRIKE_SECONDS]


def _at(incident: Incident) -> float:
    """NaN for a time that makes no sense."""
    try:
        return datetime.fromisoformat(incident.time).timestamp()
    except (ValueError, OverflowError, OSError):
        return math.nan


def _of_hang(incident: Incident) -> str:
    if incident.state == "D":
        return f"look at the disk and the device driver of {incident.node} (`dmesg`), for which it waited. {_AGAIN}"
    if incident.phase == "data":
        return f"see whether {incident.node} can still read the corpus. {_AGAIN}"
    return _AGAIN


def _of_crash(incident: Incident) -> str:
    if incident.code == -9:
        return f"find out who killed it (`dmesg` on {incident.node}, the scheduler's log). {_AGAIN}"
    return f"run `anychip doctor` on {incident.node}. {_AGAIN}"


def _of_mistake(incident: Incident) -> str:
    return f"mend this before the next start: {incident.detail[-1] if incident.detail else 'see logs/ranks'}"


_ADVICE: dict[str, Callable[[Incident], str]] = {
    "hang": _of_hang,
    "crash": _of_crash,
    "bad_input": _of_mistake,
    "unfit": _of_mistake,
    "suspect": lambda incident: (
        f"take the chip out of service, and run `anychip doctor` and `anychip probe` on {incident.node}."
    ),
    "error": _of_mistake,
    "lost": lambda incident: f"see whether {incident.node} is up and reached by the others. {_AGAIN}",
    "overdue": lambda incident: f"give it longer with --grace, if a save takes that long. {_AGAIN}",
    "disk": lambda incident: f"make room on the disk of the run, and see that it takes files. {_AGAIN}",
    "oom": lambda incident: "lower training.micro_batch_size, or set training.recompute=full. " + _AGAIN,
}
