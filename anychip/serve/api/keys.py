"""API keys: where they come from, who needs them, and how a request proves that it has one."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from anychip.errors import InputError

ENVIRONMENT = "ANYCHIP_API_KEYS"
_SHORTEST = 16


class Keys:
    """Digests of the keys. Without keys everybody may come in."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def identify(self, authorization: str) -> str | None:
        """The name of the key in an Authorization header, or None. Every key is compared, in constant time.

        `Bearer KEY`, or Basic with the key as password, which is what a browser asks a person for.
        """
        found = None
        offered = _digest(_offered(authorization))
        for number, digest in enumerate(self._digests):
            if hmac.compare_digest(offered, digest):
                found = f"key {number}"
        return found


def read_keys(file: Path | None) -> Keys:
    """Keys from a file, one a line, else from the environment variable ANYCHIP_API_KEYS, separated by commas."""
    return Keys(key_texts(file))


def key_texts(file: Path | None) -> list[str]:
    """As `read_keys`, for a program that wants the keys themselves."""
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise InputError("cannot be read as text.", where=file, do="Give a file with one key a line.") from None
        where: object = file
    else:
        lines, where = os.environ.get(ENVIRONMENT, "").split(","), ENVIRONMENT
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if file is not None and not keys:
        raise InputError("holds no key.", where=where, do="Write one key a line.")
    if any(len(key) < _SHORTEST for key in keys):
        raise InputError(
            f"holds a key of fewer than {_SHORTEST} characters.",
            where=where,
            do="Make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return keys


def check_open(host: str, has_keys: bool) -> None:
    """InputError for a server that would be open to everybody."""
    if not has_keys and not _is_loopback(host):
        raise InputError(
            f"--host {host} opens the server to others, and there is no API key.",
            where="serve",
            do=f"Give --api-keys FILE or set {ENVIRONMENT}, or serve on 127.0.0.1.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _offered(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""
