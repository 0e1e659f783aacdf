"""Signatures: in-toto Statements in DSSE envelopes (github.com/secure-systems-lab/dsse, in-toto/attestation v1).

A key is known by the SHA-256 of its public half as PEM, as OpenSSF model-signing names it. A signature by a key that
nobody named counts for nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from anychip.attest.check.findings import Refused, need, parse, sha256

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
HASHES: dict[str, Callable[[], hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key, or an ECDSA key on P-256, P-384 or P-521."""

    key: ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey

    @property
    def id(self) -> str:
        return sha256(self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def verifies(self, signature: bytes, payload: bytes) -> bool:
        how: Any = () if isinstance(self.key, ed25519.Ed25519PublicKey) else (ec.ECDSA(HASHES[self.key.curve.name]()),)
        try:
            self.key.verify(signature, pae(payload), *how)
        except InvalidSignature:
            return False
        return True


def load_public_key(pem: bytes) -> PublicKey:
    """Raises ValueError for anything but the kinds of keys above."""
    try:
        key = load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if isinstance(key, ed25519.Ed25519PublicKey):
        return PublicKey(key)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in HASHES:
        return PublicKey(key)
    raise ValueError("it is neither Ed25519 nor ECDSA on P-256, P-384 or P-521")


def pae(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def open_envelope(envelope: Any, name: str, keys: list[PublicKey]) -> dict[str, Any]:
    """The statement in an envelope that each of `keys` signed. Refused: `key` when one of them did not sign."""
    if need(envelope, "payloadType", str) != PAYLOAD_TYPE or set(envelope) != {"payload", "payloadType", "signatures"}:
        raise Refused("form", f"{name} is not an envelope with an in-toto statement.")
    payload, signatures = from_base64(need(envelope, "payload", str), name), {}
    for entry in need(envelope, "signatures", list):
        signatures[need(entry, "keyid", str)] = from_base64(need(entry, "sig", str), name)
        if set(entry) != {"keyid", "sig"}:
            raise Refused("form", f"{name} has a signature with unknown fields.")
    if not signatures:
        raise Refused("signature", f"{name} is not signed.")
    for key in keys:
        if key.id not in signatures:
            raise Refused("key", f"{name} is signed by {', '.join(i[:12] for i in signatures)}, not by {key.id[:12]}.")
        if not key.verifies(signatures[key.id], payload):
            raise Refused("signature", f"{name} does not have the signature of key {key.id[:12]} on what it says.")
    statement = parse(payload, f"the statement in {name}")
    if need(statement, "_type", str) != STATEMENT_TYPE:
        raise Refused("form", f"{name} holds no in-toto statement.")
    return dict(statement)


def subjects(statement: dict[str, Any]) -> dict[str, str]:
    """Name and SHA-256 of what a statement is about."""
    entries = need(statement, "subject", list)
    return {need(entry, "name", str): need(need(entry, "digest", dict), "sha256", str) for entry in entries}


def from_base64(text: str, name: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    if base64.b64encode(data).decode() != text:
        raise Refused("form", f"{name} is not base64 where it should be.")
    return data
