"""All checks of a release together, and what they show.

RELEASE/attestation/{model.sig, run.dsse.json, chain.jsonl, objects/SHA256.json, data.dsse.json?, chips.dsse.json?}
"""

from collections import Counter
from pathlib import Path
from typing import Any

from anychip.attest.check.findings import ATTESTATION, Findings, Problem, Reason, need, parse, read, take
from anychip.attest.check.history import POLICY, History, read_history
from anychip.attest.check.signatures import PublicKey, compare, open_envelope, root_digest, signed_files, subjects

ROLES = {"operator": "run", "data-owner": "data", "chip-vendor": "chips"}  # who signs, and what
FILES = {role: f"{what}.dsse.json" for role, what in ROLES.items()}
STATEMENTS = {role: f"urn:anychip:attestation:{what}:1" for role, what in ROLES.items()}
OTHERS: dict[str, Reason] = {"data-owner": "data", "chip-vendor": "chip"}  # what is wrong when they signed otherwise
Keys = dict[str, list[PublicKey]]


def check_release(folder: Path, keys: Keys) -> tuple[Findings, History | None]:
    """Everything that can be checked without running anything. `keys` are whose signatures are asked for, by role; an
    operator's is needed, and the first of them must be the one that signed the files."""
    findings, history, signed, statement = Findings(), None, None, None
    if not keys.get("operator"):
        findings.problem("key", "no operator's key was named, and anybody can sign. Ask the operator for the key.")
        return findings, None
    with findings.noting():
        statement = _statement(folder, "operator", keys["operator"])
    with findings.noting():
        signed = signed_files(read(folder / ATTESTATION / "model.sig", "model.sig"), "model.sig", keys["operator"][0])
        compare(folder, signed, findings)
    with findings.noting():
        history = read_history(read(folder / ATTESTATION / "chain.jsonl", "chain.jsonl"), _objects(folder))
        findings.problems += history.findings.problems
        if statement is not None and signed is not None:
            _bind(history, statement, signed, findings)
        for role in [role for role in OTHERS if keys.get(role)]:
            if subjects(_statement(folder, role, keys[role])) != about(role, history):
                findings.problem(OTHERS[role], f"the {role} signed something else.")
        if unused := set(history.objects) - history.used:
            findings.problem("extra file", f"no link names {ATTESTATION}/objects/{min(unused)}.json.")
        if not findings.problems:
            _say(findings, history, len(signed or {}), keys)
    return findings, history


def about(role: str, history: History) -> dict[str, str]:
    """What a data owner signs: the digests of all data that the chain names; a chip vendor: of all lists of chips."""
    if role == "data-owner":
        return {k: need(inputs["data"], k, str) for _, inputs, _ in history.starts for k in need(inputs, "data", dict)}
    lists = dict.fromkeys(body["members"] for body, _, _ in history.starts)
    return {f"members-{number}": digest for number, digest in enumerate(lists, start=1)}


def _statement(folder: Path, role: str, keys: list[PublicKey]) -> dict[str, Any]:
    name = FILES[role]
    return open_envelope(parse(read(folder / ATTESTATION / name, name), name), name, keys, STATEMENTS[role])


def _objects(folder: Path) -> dict[str, bytes]:
    """Objects by name; anything else below attestation/ is refused."""
    home = folder / ATTESTATION
    if foreign := sorted({p.name for p in home.iterdir()} - {"model.sig", "chain.jsonl", "objects", *FILES.values()}):
        raise Problem("extra file", f"{ATTESTATION}/{foreign[0]} does not belong there.")
    return {path.name.removesuffix(".json"): read(path, path.name) for path in (home / "objects").iterdir()}


def _bind(history: History, statement: dict[str, Any], signed: dict[str, str], findings: Findings) -> None:
    """The operator's statement, the files and the chain are about one another."""
    chain = need(need(statement, "predicate", dict), "chain", dict)
    if list(subjects(statement).values()) != [root_digest(signed)]:
        findings.problem("signature", "the operator's statement is about other files than those that are signed.")
    if take(chain, head=str, links=int) != [history.head, len(history.digests)]:
        findings.problem("truncated", f"the operator signed another chain, of {chain['links']} links, not this one.")
    if history.export is None or history.links[-1]["kind"] != "export":
        findings.problem("weights", "the chain does not end with the export of these weights.")
    elif any(signed.get(name) != digest for name, digest in history.export["files"].items()):
        findings.problem("weights", "the weights are not those that the chain says were exported.")


def _say(findings: Findings, history: History, files: int, keys: Keys) -> None:
    """What an accepted release shows, and what it does not, in plain words."""
    kinds = Counter(link["kind"] for link in history.links)
    line = history.lineage(need(history.export, "state", str))
    ends = {history.states[state][0]: history.states[state][1] for state in reversed(line)}  # the last step of a stage
    signers = ", ".join(f"{role} {key.id[:12]}" for role, them in keys.items() for key in them)
    findings.shown += [
        f"Signed by: {signers}. All {files} files are those that were signed.",
        f"The chain has {len(history.links)} links, in order, none missing. It ends with the export of "
        f"{' <- '.join(f'{stage} step {step}' for stage, step in reversed(ends.items()))}.",
        f"{len(history.starts)} starts, {kinds['rollback']} returns to an older state, {kinds['repair']} repairs after "
        f"a process died, {kinds['guard']} interventions of the guard. Every state goes on from the one before it.",
    ]
    begun: dict[str, str] = {}
    for body, inputs, members in history.starts:
        begun.setdefault(_made_by(inputs, members["ranks"]), f"{body['stage']} step {body['step']}")
    findings.shown += [f"From {since} on: {made_by}." for made_by, since in begun.items()]
    findings.not_shown += [
        "That what was recorded is true: whoever holds the operator's key could have recorded something else. "
        "`--replay N` makes that dearer: it computes steps again.",
        "That no other training began like this one: only this chain was signed.",
        "That installed files were as their lists (RECORD) say, or that the operating system told the truth.",
    ]
    origin = history.links[history.digests.index(line[-1])]
    if origin["kind"] == "derived":
        how, manifest = take(origin["body"], how=str, manifest=str)
        findings.not_shown.append(f"Where the first weights come from ({how}, {manifest[:12]}).")
    for role, what in {"data-owner": "Whose data it is", "chip-vendor": "That the chips are genuine"}.items():
        if not keys.get(role):
            findings.not_shown.append(f"{what}: no {role} was asked to sign.")


def _made_by(inputs: dict[str, Any], ranks: list[Any]) -> str:
    code, policy = need(inputs, "code", dict), inputs["policy"]
    chips = Counter(f"{rank.get('model')} ({rank['vendor']}, driver {rank.get('driver')})" for rank in ranks)
    counted = "; ".join(f"{count} x {name}" for name, count in chips.items())
    given = " and ".join(f"{name} {', '.join(map(str, policy[name]))}" for name in POLICY if policy[name])
    package, commit = need(code, "package", str)[:12], code.get("commit") or "unknown"
    return f"code {package} (commit {commit}); {counted}; policy: {given or 'none'}, kept at every start"
