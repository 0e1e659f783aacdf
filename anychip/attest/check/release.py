"""All checks of a release together, and what they show.

RELEASE/attestation/{model.sig, run.dsse.json, chain.jsonl, objects/SHA256.json, data.dsse.json?, chips.dsse.json?}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anychip.attest.check.envelope import PublicKey, open_envelope, subjects
from anychip.attest.check.files import ATTESTATION, compare, root_digest, signed_files
from anychip.attest.check.findings import Findings, Refused, need, parse, read
from anychip.attest.check.history import History, read_history
from anychip.attest.check.words import say

STATEMENTS = {role: f"urn:anychip:attestation:{name}:1" for role, name in
              {"operator": "run", "data-owner": "data", "chip-vendor": "chips"}.items()}  # fmt: skip
FILES = {"operator": "run.dsse.json", "data-owner": "data.dsse.json", "chip-vendor": "chips.dsse.json"}
Keys = dict[str, list[PublicKey]]


def check_release(folder: Path, keys: Keys) -> tuple[Findings, History | None]:
    """Everything that can be checked without running anything. `keys` are whose signatures are asked for, by role; an
    operator's is needed, and the first of them must be the one that signed the files."""
    findings, history, signed, statement = Findings(), None, None, None
    if not keys.get("operator"):
        findings.problem("key", "no operator's key was named, and anybody can sign. Ask the operator for the key.")
        return findings, None
    try:
        statement = _statement(folder, "operator", keys["operator"])
    except Refused as refused:
        findings.problems.append(refused.problem)
    try:
        signed = signed_files(read(folder / ATTESTATION / "model.sig", "model.sig"), "model.sig", keys["operator"][0])
        compare(folder, signed, findings)
    except Refused as refused:
        findings.problems.append(refused.problem)
    except OSError as error:
        findings.problem("form", f"a file cannot be read ({error}).")
    try:
        history = read_history(read(folder / ATTESTATION / "chain.jsonl", "chain.jsonl"), _objects(folder))
        findings.problems += history.findings.problems
        if statement is not None and signed is not None:
            _bind(history, statement, signed, findings)
        for role in [role for role in ("data-owner", "chip-vendor") if keys.get(role)]:
            if subjects(_statement(folder, role, keys[role])) != ABOUT[role](history):
                findings.problem("data" if role == "data-owner" else "chip", f"the {role} signed something else.")
        if unused := set(history.objects) - history.used:
            findings.problem("extra file", f"no link names {ATTESTATION}/objects/{min(unused)}.json.")
        if not findings.problems:
            say(findings, history, len(signed or {}), keys)
    except Refused as refused:
        findings.problems.append(refused.problem)
    return findings, history


def about_data(history: History) -> dict[str, str]:
    """The digests of all corpora and tokenizers that the chain names."""
    pinned = [need(inputs, "data", dict) for _, inputs, _ in history.starts]
    return {name: need(data, name, str) for data in pinned for name in data}


def about_chips(history: History) -> dict[str, str]:
    """The digests of all lists of chips that the chain names."""
    lists = dict.fromkeys(need(body, "members", str) for body, _, _ in history.starts)
    return {f"members-{number}": digest for number, digest in enumerate(lists, start=1)}


ABOUT = {"data-owner": about_data, "chip-vendor": about_chips}


def _statement(folder: Path, role: str, keys: list[PublicKey]) -> dict[str, Any]:
    name = FILES[role]
    statement = open_envelope(parse(read(folder / ATTESTATION / name, name), name), name, keys)
    if need(statement, "predicateType", str) != STATEMENTS[role]:
        raise Refused("signature", f"{name} holds another statement than a {role}'s.")
    return statement


def _objects(folder: Path) -> dict[str, bytes]:
    """Objects by name; anything else below attestation/ is refused."""
    home = folder / ATTESTATION
    known = {"model.sig", "chain.jsonl", "objects", *FILES.values()}
    if foreign := sorted({path.name for path in home.iterdir()} - known):
        raise Refused("extra file", f"{ATTESTATION}/{foreign[0]} does not belong there.")
    if not (home / "objects").is_dir():
        raise Refused("missing file", f"{ATTESTATION}/objects is not there.")
    return {path.name.removesuffix(".json"): read(path, path.name) for path in (home / "objects").iterdir()}


def _bind(history: History, statement: dict[str, Any], signed: dict[str, str], findings: Findings) -> None:
    """The operator's statement, the files and the chain are about one another."""
    chain = need(need(statement, "predicate", dict), "chain", dict)
    if list(subjects(statement).values()) != [root_digest(signed)]:
        findings.problem("signature", "the operator's statement is about other files than those that are signed.")
    if (need(chain, "head", str), need(chain, "links", int)) != (history.head, len(history.digests)):
        what = f"the operator signed a chain of {chain['links']} links that ends otherwise"
        findings.problem("truncated", f"{what}; this one has {len(history.digests)}.")
    if history.export is None or history.links[-1]["kind"] != "export":
        findings.problem("weights", "the chain does not end with the export of these weights.")
    elif any(signed.get(name) != digest for name, digest in history.export["files"].items()):
        findings.problem("weights", "the weights are not those that the chain says were exported.")
