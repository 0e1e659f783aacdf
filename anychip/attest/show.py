"""A chain as a person reads it, signed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anychip.attest.check.findings import ATTESTATION, Problem
from anychip.attest.check.history import History
from anychip.attest.costs import count_costs
from anychip.attest.release import history_of_run
from anychip.attest.sign import history_of
from anychip.errors import InputError
from anychip.rundir import RunDirectory


def show(folder: Path) -> str:
    """Every link in a line, what is pinned, what it cost, and what is wrong with it. Raises InputError."""
    try:
        is_release = (folder / ATTESTATION / "chain.jsonl").is_file()
        history = history_of(folder) if is_release else history_of_run(RunDirectory(folder))
        lines = [_line(link) for link in history.links]
        lines += ["", *_pinned(history), *count_costs(history).lines()]
    except (Problem, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"its chain cannot be read: {error}", where=folder, do="Check the release.") from None
    problems = [f"- {problem.reason}: {problem.what}" for problem in history.findings.problems]
    lines += ["", "The chain does not hold:", *problems] if problems else ["", "Each link follows the one before it."]
    return "\n".join([*lines, "Who signed it, `anychip attest check RELEASE` says."])


def _line(link: dict[str, Any]) -> str:
    body = link["body"]
    told = {
        "start": lambda: f"{body['processes']} processes begin at step {body['step']} ({body['arithmetic']})",
        "claim": lambda: f"steps {body['from_step'] + 1} to {body['step']} in {body['seconds']} s",
        "saved": lambda: f"checkpoint {body['manifest'][:12]} of state {body['claim'][:12]}",
        "rollback": lambda: f"back to state {body['to'][:12]}; {body['dropped']} steps given up",
        "derived": lambda: f"checkpoint {body['manifest'][:12]} of step {body['step']}, {body['how']}",
        "guard": lambda: "; ".join(f"step {r.get('step')}: {r.get('action')}" for r in body["rows"]),
        "stage": lambda: "ended",
        "export": lambda: f"step {body['step']}, checkpoint {body['manifest'][:12]}, {len(body['files'])} files",
    }.get(link["kind"], lambda: str(body.get("why", "")))()
    return f"{link['n']:>5} {link['time'][:19]} {link['kind']:<9} {body.get('stage', ''):<9} {told}".rstrip()


def _pinned(history: History) -> list[str]:
    starts = [link["body"] for link in history.links if link["kind"] == "start"]
    found: list[str] = []
    for body in starts:
        inputs = history.lookup(body["inputs"], "inputs")
        packages = len(inputs["environment"]["distributions"])
        found += [
            f"- code {inputs['code']['package'][:12]}, commit {inputs['code']['commit'] or 'unknown'}",
            f"- environment: Python {inputs['environment']['python']}, {packages} distributions",
            *(f"- {name}: {digest}" for name, digest in inputs["data"].items()),
            *(f"- policy {name}: {', '.join(words)}" for name, words in inputs["policy"].items() if words),
        ]
    return list(dict.fromkeys(found))
