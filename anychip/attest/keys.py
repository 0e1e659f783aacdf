"""Private keys of signers: made here, kept here, never sent anywhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from anychip.attest.check.signatures import HASHES, PublicKey, pae
from anychip.errors import InputError
from anychip.files import write_text

PASSPHRASE_VARIABLE = "ANYCHIP_KEY_PASSPHRASE"
Kind = Literal["ecdsa", "ed25519"]
_PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class SigningKey:
    """An Ed25519 key, or an ECDSA key on P-256, P-384 or P-521."""

    key: _PrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key())

    @property
    def signs_models(self) -> bool:
        """OpenSSF model-signing knows ECDSA keys only."""
        return isinstance(self.key, ec.EllipticCurvePrivateKey)

    def sign(self, payload: bytes) -> bytes:
        """A signature on a statement, as DSSE wraps it."""
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            return self.key.sign(pae(payload))
        return self.key.sign(pae(payload), ec.ECDSA(HASHES[self.key.curve.name]()))


def make_key(path: Path, kind: Kind = "ecdsa") -> Path:
    """Write a private key to `path`, for its owner alone, and its public half beside it; returns the latter's path.

    ecdsa: P-256. $ANYCHIP_KEY_PASSPHRASE, if set, encrypts it. Raises InputError when there is a file already.
    """
    public = public_path(path)
    for existing in (path, public):
        if existing.exists():
            raise InputError("exists and is not overwritten.", where=existing, do="Choose another path.")
    key: _PrivateKey = (
        ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    )
    phrase = os.environ.get(PASSPHRASE_VARIABLE, "").encode()
    encryption: KeySerializationEncryption = BestAvailableEncryption(phrase) if phrase else NoEncryption()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_text(public, pem.decode())
    return public


def existing_key(path: Path) -> Path:
    """The key at `path`, made now if there is none. Raises InputError when it is there and cannot sign a release."""
    if not path.exists():
        print(f"wrote {path} (keep it) and {make_key(path)} (publish it)", flush=True)
    elif not load_key(path).signs_models:
        raise InputError("is no ECDSA key, and others do not sign weights.", where=path, do="Name another attest.key.")
    return path


def public_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.pub.pem")


def load_key(path: Path) -> SigningKey:
    """Raises InputError when the file is no private key that can sign here."""
    try:
        data = path.read_bytes()
    except OSError as error:
        do = "Make one with `anychip attest keygen`."
        raise InputError(f"cannot be read ({error.strerror}).", where=path, do=do) from None
    phrase = os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None
    try:
        key = load_pem_private_key(data, phrase)
    except TypeError:  # encrypted without a passphrase, or the other way round
        what = "is not encrypted" if phrase else "is encrypted"
        do = f"{'Unset' if phrase else 'Set'} {PASSPHRASE_VARIABLE}."
        raise InputError(f"{what}.", where=path, do=do) from None
    except (ValueError, UnsupportedAlgorithm):
        do = "Give a private key that `anychip attest keygen` made, and its passphrase."
        raise InputError("is not a private key in PEM, or the passphrase is wrong.", where=path, do=do) from None
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return SigningKey(key)
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in HASHES:
        return SigningKey(key)
    raise InputError("is neither Ed25519 nor ECDSA on P-256, P-384 or P-521.", where=path, do="Use such a key.")
