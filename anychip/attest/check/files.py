"""Every file of the folder is one that was signed: an OpenSSF model-signing signature (v1.0), all but `attestation/`.

The signature is a Sigstore bundle with a DSSE envelope; its statement holds the SHA-256 of every file, and one of all
of these as its subject. `model_signing verify key` of that project reads it too.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from anychip.attest.check.envelope import PublicKey, open_envelope, subjects
from anychip.attest.check.findings import Findings, Refused, need, parse

ATTESTATION = "attestation"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE = "https://model_signing/signature/v1.0"
SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [ATTESTATION]}


def root_digest(files: dict[str, str]) -> str:
    """One digest for all files: SHA-256 over their digests in the order of their names."""
    return hashlib.sha256(b"".join(bytes.fromhex(files[name]) for name in sorted(files))).hexdigest()


def signed_files(data: bytes, name: str, key: PublicKey) -> dict[str, str]:
    """Path and SHA-256 of each file that `key` signed."""
    bundle = parse(data, name)
    envelope: Any = need(bundle, "dsseEnvelope", dict)
    if set(bundle) != {"mediaType", "verificationMaterial", "dsseEnvelope"} or bundle["mediaType"] != BUNDLE:
        raise Refused("form", f"{name} is not a model signature.")
    if bundle["verificationMaterial"] != {"publicKey": {"hint": key.id}, "tlogEntries": []}:
        raise Refused("key", f"{name} is made with another key than {key.id[:12]}, or says so.")
    for entry in need(envelope, "signatures", list):
        if need(entry, "keyid", str):
            raise Refused("form", f"{name}: a model signature names its key elsewhere.")
        entry["keyid"] = key.id
    statement = open_envelope(envelope, name, [key])
    predicate = need(statement, "predicate", dict)
    if need(statement, "predicateType", str) != PREDICATE or predicate.get("serialization") != SERIALIZATION:
        raise Refused("form", f"{name} signs files in another way than this verifier knows.")
    files = {need(resource, "name", str): _digest(resource) for resource in need(predicate, "resources", list)}
    if list(subjects(statement).values()) != [root_digest(files)]:
        raise Refused("form", f"{name} contradicts itself: its files do not have the digest of its subject.")
    return files


def compare(folder: Path, signed: dict[str, str], findings: Findings) -> None:
    """Say what differs between the folder and what was signed."""
    found = set()
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in [*names, *folders]):
            name = path.relative_to(folder).as_posix()
            if name.split("/")[0] == ATTESTATION or (path.is_dir() and not path.is_symlink()):
                continue
            found.add(name)
            if name not in signed or path.is_symlink() or not path.is_file():
                findings.problem("extra file", f"{name} is not one of the files that were signed.")
            elif sha256_file(path) != signed[name]:
                findings.problem("bytes", f"{name} is not the file that was signed.")
    for name in sorted(set(signed) - found):
        findings.problem("missing file", f"{name} was signed and is not there.")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digest(resource: Any) -> str:
    digest: str = need(resource, "digest", str)
    if need(resource, "algorithm", str) != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise Refused("form", "a signed file has no SHA-256.")
    return digest
