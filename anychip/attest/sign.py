"""Signing: the files of a release, the run that made them, and what others say of its data and chips."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anychip.attest.check.findings import ATTESTATION, Problem, canonical, parse, read
from anychip.attest.check.history import History, read_history
from anychip.attest.check.release import FILES, STATEMENTS, about
from anychip.attest.check.signatures import (
    BUNDLE,
    PAYLOAD_TYPE,
    PREDICATE,
    SERIALIZATION,
    STATEMENT_TYPE,
    root_digest,
    sha256_file,
)
from anychip.attest.keys import SigningKey
from anychip.errors import InputError
from anychip.files import atomic_writer

ROLES = tuple(FILES)


def sign_files(folder: Path, name: str, key: SigningKey) -> str:
    """Write attestation/model.sig over every file of a release; returns the digest of all of them.

    Raises InputError for a key of a kind that OpenSSF model-signing does not know.
    """
    if not key.signs_models:
        raise InputError(
            "An Ed25519 key cannot sign weights in OpenSSF's format.", do="Make one with `keygen --kind ecdsa`."
        )
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in _files(folder)}
    resources = [{"name": name, "algorithm": "sha256", "digest": files[name]} for name in sorted(files)]
    root = root_digest(files)
    predicate = {"serialization": SERIALIZATION, "resources": resources}
    payload = make_statement({name: root}, PREDICATE, predicate)
    signature = {"keyid": "", "sig": _base64(key.sign(payload))}
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": key.public.id}, "tlogEntries": []},
        "dsseEnvelope": {"payload": _base64(payload), "payloadType": PAYLOAD_TYPE, "signatures": [signature]},
    }
    _write(folder / ATTESTATION / "model.sig", canonical(bundle))
    return root


def sign_run(folder: Path, name: str, root: str, key: SigningKey) -> None:
    """The operator's statement: these files, and this chain to its last link."""
    history = history_of(folder)
    chain = {"head": history.head, "links": len(history.digests)}
    payload = make_statement({name: root}, STATEMENTS["operator"], {"run": name, "chain": chain})
    _write_envelope(folder / ATTESTATION / FILES["operator"], payload, [], key)


def add_signature(folder: Path, role: str, key: SigningKey) -> Path:
    """Sign a release in a role: an operator signs what the first one signed; a data owner that all data it names is
    theirs, a chip vendor that all chips are. Returns the file. Raises InputError when that cannot be."""
    path = folder / ATTESTATION / FILES[role]
    try:
        envelope = parse(read(path, path.name), path.name) if path.exists() else None
        if envelope is None and role == "operator":
            raise InputError("is not an attested release.", where=folder, do="Make one with `anychip release`.")
        if envelope is not None:
            payload, signatures = base64.b64decode(envelope["payload"]), envelope["signatures"]
        else:
            history = history_of(folder)
            payload, signatures = make_statement(about(role, history), STATEMENTS[role], {}), []
    except (Problem, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot be signed: {error}", where=folder, do="Check it with `anychip attest check`."
        ) from None
    _write_envelope(path, payload, signatures, key)
    return path


def history_of(folder: Path) -> History:
    """The chain of a release, read without asking who signed it."""
    home = folder / ATTESTATION
    objects = {path.stem: path.read_bytes() for path in sorted((home / "objects").glob("*.json"))}
    return read_history((home / "chain.jsonl").read_bytes(), objects)


def make_statement(subjects: dict[str, str], kind: str, predicate: dict[str, Any]) -> bytes:
    """An in-toto statement of this predicate type about things by name and SHA-256."""
    subject = [{"name": name, "digest": {"sha256": digest}} for name, digest in subjects.items()]
    return canonical({"_type": STATEMENT_TYPE, "subject": subject, "predicateType": kind, "predicate": predicate})


def _write_envelope(path: Path, payload: bytes, signatures: list[Any], key: SigningKey) -> None:
    mine = {"keyid": key.public.id, "sig": _base64(key.sign(payload))}
    others = [signature for signature in signatures if signature["keyid"] != mine["keyid"]]
    envelope = {"payload": _base64(payload), "payloadType": PAYLOAD_TYPE, "signatures": [*others, mine]}
    _write(path, canonical(envelope))


def _files(folder: Path) -> Iterable[Path]:
    return (p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] != ATTESTATION)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _write(path: Path, data: bytes) -> None:
    with atomic_writer(path) as handle:
        handle.write(data)
