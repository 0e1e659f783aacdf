"""Messages between coordinator and agents: lines of JSON that only who knows the job's token can write.

    server -> client   {"anychip": 1, "nonce": NS}
    client -> server   {"nonce": NC, "proof": HMAC(token, "client" NS NC)}
    server -> client   {"proof": HMAC(token, "server" NS NC)}
    both               HMAC(key of this direction, number, text) text

Both sides prove the token without sending it; the keys of a connection depend on both nonces, and messages are
numbered, so nothing that was recorded can be played again, left out or put in another order. Messages are not secret:
they name hosts, steps and exit codes. HMAC-SHA256 throughout (RFC 2104).

No input or output here: `receive` takes bytes, `take` gives the bytes to send.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from anychip.errors import InputError

LARGEST_MESSAGE_BYTES = 1 << 20
_LARGEST_GREETING_BYTES = 512
_LARGEST_WAITING_BYTES = 8 << 20
_LEAST_TOKEN_BYTES, _NONCE_BYTES, _MAC_DIGITS = 16, 16, 64
_VERSION = 1


class ChannelError(Exception):
    """What came is not from who knows the token, or makes no sense; the connection is of no use any more."""


def read_token(path: Path) -> bytes:
    """The secret of a job. Raises InputError when it is too short or others can read it."""
    try:
        mode, token = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}).", where=path, do=_MAKE) from None
    if stat.S_IMODE(mode) & 0o077:
        raise InputError("can be read by others.", where=path, do="Run `chmod 600` on it.")
    if len(token) < _LEAST_TOKEN_BYTES:
        raise InputError(f"holds fewer than {_LEAST_TOKEN_BYTES} bytes.", where=path, do=_MAKE)
    return token


_MAKE = "Make one with `(umask 077; openssl rand -hex 32 > FILE)` and copy it to every host."


class Session:
    """One end of a connection."""

    def __init__(self, token: bytes, *, is_server: bool) -> None:
        self._token, self._is_server = token, is_server
        self._nonce = secrets.token_hex(_NONCE_BYTES)
        self._in, self._out = bytearray(), bytearray()
        self._keys: tuple[bytes, bytes] | None = None  # to send with, to receive with
        self._proof = ""
        self._sent = self._received = 0
        self.ready = False  # the other end has proved the token
        if is_server:
            self._put({"anychip": _VERSION, "nonce": self._nonce})

    def receive(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that are whole with this data. Raises ChannelError."""
        self._in += data
        messages = []
        while (end := self._in.find(b"\n")) >= 0:
            line = bytes(self._in[:end])
            del self._in[: end + 1]
            self._check_length(len(line))
            if self.ready:
                messages.append(self._opened(line))
            else:
                self._greet(_parsed(line))
        self._check_length(len(self._in))
        return messages

    def send(self, message: dict[str, Any]) -> None:
        """Raises ChannelError when the other end has not taken what was sent before."""
        if not self.ready or self._keys is None:
            raise ChannelError("not connected yet")
        text = json.dumps(message, separators=(",", ":")).encode()
        if len(text) + _MAC_DIGITS + 1 > LARGEST_MESSAGE_BYTES or len(self._out) > _LARGEST_WAITING_BYTES:
            raise ChannelError("too much to send")
        self._out += _mac(self._keys[0], self._sent, text).encode() + b" " + text + b"\n"
        self._sent += 1

    @property
    def waiting(self) -> memoryview:
        """What is to be sent next."""
        return memoryview(bytes(self._out[:_CHUNK_BYTES]))

    def took(self, count: int) -> None:
        """So many bytes of `waiting` are sent."""
        del self._out[:count]

    def _check_length(self, length: int) -> None:
        if length > (LARGEST_MESSAGE_BYTES if self.ready else _LARGEST_GREETING_BYTES):
            raise ChannelError("a line is too long")

    def _put(self, greeting: dict[str, Any]) -> None:
        self._out += json.dumps(greeting).encode() + b"\n"

    def _greet(self, greeting: dict[str, Any]) -> None:
        if self._is_server:
            self._agree(self._nonce, _text(greeting, "nonce"))
            self._check_proof(greeting, "client")
            self._put({"proof": self._prove("server")})
            self.ready = True
        elif self._keys is None:
            if greeting.get("anychip") != _VERSION:
                raise ChannelError("the other end speaks another version")
            self._agree(_text(greeting, "nonce"), self._nonce)
            self._put({"nonce": self._nonce, "proof": self._prove("client")})
        else:
            self._check_proof(greeting, "server")
            self.ready = True

    def _agree(self, server_nonce: str, client_nonce: str) -> None:
        self._proof = f"{server_nonce} {client_nonce}"
        keys = [hmac.digest(self._token, f"key {end} {self._proof}".encode(), "sha256") for end in ("server", "client")]
        self._keys = (keys[0], keys[1]) if self._is_server else (keys[1], keys[0])

    def _prove(self, end: str) -> str:
        return hmac.new(self._token, f"proof {end} {self._proof}".encode(), hashlib.sha256).hexdigest()

    def _check_proof(self, greeting: dict[str, Any], end: str) -> None:
        if not hmac.compare_digest(_text(greeting, "proof").encode(), self._prove(end).encode()):
            raise ChannelError("the other end does not know the token")

    def _opened(self, line: bytes) -> dict[str, Any]:
        assert self._keys is not None
        mac, text = line[:_MAC_DIGITS], line[_MAC_DIGITS + 1 :]
        if not hmac.compare_digest(mac, _mac(self._keys[1], self._received, text).encode()):
            raise ChannelError("a message is not from the other end, or not in its place")
        self._received += 1
        return _parsed(text)


_CHUNK_BYTES = 1 << 16


def _mac(key: bytes, number: int, text: bytes) -> str:
    return hmac.new(key, number.to_bytes(8, "big") + text, hashlib.sha256).hexdigest()


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ChannelError("a line is not JSON") from None
    if not isinstance(value, dict):
        raise ChannelError("a line is not an object")
    return value


def _text(greeting: dict[str, Any], key: str) -> str:
    value = greeting.get(key)
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32,64}", value):
        raise ChannelError(f"a greeting without {key}")
    return value
