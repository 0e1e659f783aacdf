"""What an accepted release shows, and what it does not, in plain words."""

from __future__ import annotations

from collections import Counter
from typing import Any

from anychip.attest.check.envelope import PublicKey
from anychip.attest.check.findings import Findings, need
from anychip.attest.check.history import History


def say(findings: Findings, history: History, files: int, keys: dict[str, list[PublicKey]]) -> None:
    kinds = Counter(link["kind"] for link in history.links)
    signers = ", ".join(f"{role} {key.id[:12]}" for role, them in keys.items() for key in them)
    export = history.export or {}
    line = history.lineage(need(export, "state", str))
    stages = " <- ".join(f"{stage} step {step}" for stage, step in _ends(history, line))
    findings.shown += [
        f"Signed by: {signers}. All {files} files are those that were signed.",
        f"The chain has {len(history.links)} links, in order, none missing. It ends with the export of {stages}.",
        f"{len(history.starts)} starts, {kinds['rollback']} returns to an older state, {kinds['repair']} repairs after "
        f"a process died, {kinds['guard']} interventions of the guard. Every state goes on from the one before it.",
    ]
    seen: list[Any] = []
    for body, inputs, members in history.starts:
        told = [_code(inputs), *_chips(members["ranks"]), _policy(inputs["policy"])]
        new = [text for text in told if text not in seen]
        seen += new
        if new:
            findings.shown.append(f"From {body['stage']} step {body['step']} on: {'; '.join(new)}.")
    findings.not_shown += [
        "That what was recorded is true: whoever holds the operator's key could have recorded something else. "
        "`--replay N` makes that dearer: it computes steps again.",
        "That no other training began like this one: only this chain was signed.",
        "That installed files were as their lists (RECORD) say, or that the operating system told the truth.",
    ]
    if (origin := history.links[history.digests.index(line[-1])])["kind"] == "derived":
        body = origin["body"]
        findings.not_shown.append(f"Where the first weights come from ({body['how']}, {body['manifest'][:12]}).")
    for role, what in {"data-owner": "Whose data it is", "chip-vendor": "That the chips are genuine"}.items():
        if not keys.get(role):
            findings.not_shown.append(f"{what}: no {role} was asked to sign.")


def _ends(history: History, line: list[str]) -> list[tuple[str, int]]:
    """The last state of each stage along a lineage, newest first."""
    found: dict[str, int] = {}
    for state in line:
        found.setdefault(*history.states[state])
    return list(found.items())


def _code(inputs: dict[str, Any]) -> str:
    code = need(inputs, "code", dict)
    return f"code {need(code, 'package', str)[:12]} (commit {code.get('commit') or 'unknown'})"


def _chips(ranks: list[Any]) -> list[str]:
    names = Counter(f"{rank.get('model')} ({rank['vendor']}, driver {rank.get('driver')})" for rank in ranks)
    return [f"{count} x {name}" for name, count in names.items()]


def _policy(policy: dict[str, Any]) -> str:
    given = [f"{name} {', '.join(policy[name])}" for name in sorted(policy) if policy[name]]
    return f"policy: {' and '.join(given) or 'none'}, kept at every start"
