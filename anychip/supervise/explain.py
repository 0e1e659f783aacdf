"""A run in sentences: how far it came, what went wrong, and what to do now."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from anychip.rundir import RunDirectory
from anychip.supervise.incidents import LOG_NAME, Incident, read_incidents
from anychip.supervise.record import quarantined
from anychip.supervise.watch import Beat, process_state, read_beat
from anychip.train.checkpoint.directory import complete_steps

_SHOWN = 5
_LEMON = 3


def explain(run: RunDirectory) -> str:
    """Text for a person. Raises InputError when `run` is no run directory."""
    recipe = run.read_recipe()
    incidents = read_incidents(run.logs / LOG_NAME)
    parts = [_progress(run, recipe.training.steps), _now(run), *_incidents(incidents), *_left_out(run), *_guard(run)]
    return "\n".join([*(part for part in parts if part), _advice(run, incidents, recipe.training.steps)])


def _progress(run: RunDirectory, steps: int) -> str:
    saved = complete_steps(run.checkpoints)
    if run.finished("train"):
        return f"{run.root}: training ended at step {steps} of {steps}."
    newest = f"the newest checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint"
    return f"{run.root}: training stands before step {steps}; {newest}."


def _now(run: RunDirectory) -> str:
    """What the newest generation's processes are doing, from the last line of each."""
    if run.finished("train"):
        return ""
    folders = sorted((run.logs / "heartbeats").glob("generation-*"))
    beats = [beat for path in sorted(folders[-1].glob("rank-*")) if (beat := read_beat(path))] if folders else []
    if not beats:
        return ""
    alive = [beat for beat in beats if process_state(beat.pid) not in ("", "Z") and _is_ours(beat)]
    if not alive:
        last = max(beats, key=lambda beat: beat.at)
        return f"No process of it is alive here; the last word was step {last.step}, {last.phase}, of rank {last.rank}."
    behind = min(alive, key=lambda beat: (beat.step, beat.at))
    silent = time.monotonic() - max(beat.at for beat in alive)
    return (
        f"{len(alive)} of {len(beats)} processes are alive; the furthest behind is rank {behind.rank} in step "
        f"{behind.step}, {behind.phase}; the last word came {silent:.0f} s ago."
    )


def _is_ours(beat: Beat) -> bool:
    """Whether the process of this number is still the one that beat, and not a later one of the same number."""
    try:
        return b"anychip" in Path(f"/proc/{beat.pid}/cmdline").read_bytes()
    except OSError:
        return False


def _incidents(incidents: list[Incident]) -> list[str]:
    if not incidents:
        return ["No incident was recorded."]
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(i.kind for i in incidents).most_common())
    shown = [f"  {incident.sentence()}" for incident in incidents[-_SHOWN:]]
    lines = [f"{len(incidents)} incidents ({kinds}); the last:", *shown]
    stack = incidents[-1].stack
    return [*lines, "  It was here:", *(f"    {frame}" for frame in stack[:6])] if stack else lines


def _left_out(run: RunDirectory) -> list[str]:
    return [f"{name} is in quarantine: {why}." for name, why in quarantined(run).items()]


def _guard(run: RunDirectory) -> list[str]:
    rows = _rows(run.logs / "guard.jsonl")
    if not rows:
        return []
    last = rows[-1]
    text = f"{len(rows)} steps were judged bad; the last: step {last.get('step')}, {last.get('problem')}."
    documents = last.get("documents") or []
    return [text, f"  Its documents: {', '.join(map(str, documents[:_SHOWN]))}"] if documents else [text]


def _advice(run: RunDirectory, incidents: list[Incident], steps: int) -> str:
    if run.finished("train"):
        return "Nothing is to be done."
    worst = Counter((i.node, i.rank) for i in incidents if i.kind in ("crash", "hang")).most_common(1)
    if worst and worst[0][1] >= _LEMON:
        (node, rank), count = worst[0]
        return f"Rank {rank} on {node} failed {count} times: take its chip out and run `anychip doctor` there."
    last = incidents[-1] if incidents else None
    if last and last.kind in ("bad_input", "unfit", "error"):
        detail = last.detail[-1] if last.detail else "see logs/ranks"
        return f"Mend this before the next start: {detail}"
    if last and last.kind == "oom":
        return "Lower training.micro_batch_size, or set training.recompute=full."
    return "Start it again: it goes on from the newest good checkpoint."


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
