"""Signatures: in-toto Statements in DSSE envelopes (github.com/secure-systems-lab/dsse, in-toto/attestation v1); of the
files one by OpenSSF's model-signing (v1.0), which `model_signing verify key` reads too.

A key is known by the SHA-256 of its public half as PEM. A signature by a key that nobody named counts for nothing.
"""

import base64
import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from anychip.attest.check.findings import ATTESTATION, Findings, Problem, need, parse, sha256, take, take_all

PAYLOAD_TYPE, STATEMENT_TYPE = "application/vnd.in-toto+json", "https://in-toto.io/Statement/v1"
BUNDLE, PREDICATE = "application/vnd.dev.sigstore.bundle.v0.3+json", "https://model_signing/signature/v1.0"
SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [ATTESTATION]}
HASHES: dict[str, Any] = {"secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512}


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key, or an ECDSA key on P-256, P-384 or P-521."""

    key: ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey

    @property
    def id(self) -> str:
        return sha256(self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def verifies(self, signature: bytes, payload: bytes) -> bool:
        how: Any = () if isinstance(self.key, ed25519.Ed25519PublicKey) else (ec.ECDSA(HASHES[self.key.curve.name]()),)
        with suppress(InvalidSignature):
            self.key.verify(signature, pae(payload), *how)
            return True
        return False


def load_public_key(path: str | Path) -> PublicKey:
    """From a PEM file. Raises ValueError for one that cannot be read, and for other kinds of keys."""
    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except (OSError, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from None
    if isinstance(key, ed25519.Ed25519PublicKey):
        return PublicKey(key)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in HASHES:
        return PublicKey(key)
    raise ValueError("it is neither Ed25519 nor ECDSA on P-256, P-384 or P-521")


def pae(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def open_envelope(envelope: Any, name: str, keys: list[PublicKey], kind: str) -> dict[str, Any]:
    """The statement of this kind in an envelope that each of `keys` signed. Problem `key`: one of them did not."""
    text, payload_type, entries = take_all(envelope, payload=str, payloadType=str, signatures=list)
    payload, signatures = _from_base64(text, name), {}
    for entry in entries:
        key_id, signature = take_all(entry, keyid=str, sig=str)
        signatures[key_id] = _from_base64(signature, name)
    if not signatures:
        raise Problem("signature", f"{name} is not signed.")
    for key in keys:
        if key.id not in signatures:
            raise Problem("key", f"{name} is signed by {', '.join(i[:12] for i in signatures)}, not by {key.id[:12]}.")
        if not key.verifies(signatures[key.id], payload):
            raise Problem("signature", f"{name} does not have the signature of key {key.id[:12]} on what it says.")
    statement: dict[str, Any] = parse(payload, f"the statement in {name}")
    if [payload_type, *take(statement, _type=str, predicateType=str)] != [PAYLOAD_TYPE, STATEMENT_TYPE, kind]:
        raise Problem("form", f"{name} holds another statement than it should.")
    return statement


def subjects(statement: dict[str, Any]) -> dict[str, str]:
    """Name and SHA-256 of what a statement is about."""
    entries = [take(entry, name=str, digest=dict) for entry in need(statement, "subject", list)]
    return {name: need(digest, "sha256", str) for name, digest in entries}


def signed_files(data: bytes, name: str, key: PublicKey) -> dict[str, str]:
    """Path and SHA-256 of each file that `key` signed."""
    bundle = parse(data, name)
    kind, material, envelope = take_all(bundle, mediaType=str, verificationMaterial=dict, dsseEnvelope=dict)
    if material != {"publicKey": {"hint": key.id}, "tlogEntries": []}:
        raise Problem("key", f"{name} is made with another key than {key.id[:12]}, or says so.")
    for entry in need(envelope, "signatures", list):
        if need(entry, "keyid", str):
            raise Problem("form", f"{name}: a model signature names its key elsewhere.")
        entry["keyid"] = key.id
    statement = open_envelope(envelope, name, [key], PREDICATE)
    predicate = need(statement, "predicate", dict)
    if (kind, predicate.get("serialization")) != (BUNDLE, SERIALIZATION):
        raise Problem("form", f"{name} signs files in another way than this verifier knows.")
    files = {}
    for resource in need(predicate, "resources", list):
        path, algorithm, digest = take(resource, name=str, algorithm=str, digest=str)
        if algorithm != "sha256" or not re.fullmatch("[0-9a-f]{64}", digest):
            raise Problem("form", f"{name} has a file without a SHA-256.")
        files[path] = digest
    if list(subjects(statement).values()) != [root_digest(files)]:
        raise Problem("form", f"{name} contradicts itself: its files do not have the digest of its subject.")
    return files


def root_digest(files: dict[str, str]) -> str:
    """One digest for all files: SHA-256 over their digests in the order of their names."""
    return sha256(b"".join(bytes.fromhex(files[name]) for name in sorted(files)))


def compare(folder: Path, signed: dict[str, str], findings: Findings) -> None:
    """Say what differs between the folder, all but `attestation/`, and what was signed."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    found = [name for name, path in paths.items() if path.is_symlink() or not path.is_dir()]
    for name in sorted(name for name in found if name.split("/")[0] != ATTESTATION):
        if name not in signed or paths[name].is_symlink() or not paths[name].is_file():
            findings.problem("extra file", f"{name} is not one of the files that were signed.")
        elif sha256_file(paths[name]) != signed[name]:
            findings.problem("bytes", f"{name} is not the file that was signed.")
    for name in sorted(set(signed) - set(found)):
        findings.problem("missing file", f"{name} was signed and is not there.")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _from_base64(text: str, name: str) -> bytes:
    with suppress(ValueError):
        data = base64.b64decode(text, validate=True)
        if base64.b64encode(data).decode() == text:
            return data
    raise Problem("form", f"{name} is not base64 where it should be.")
