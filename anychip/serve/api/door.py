"""What every request passes before anything looks at it: host, origin, key, size, time, depth.

A page on the web can make a browser talk to a server on its own machine. Names that resolve to it (DNS rebinding) are
refused by the Host header, scripts of other sites by the Origin header; no answer allows another origin to read it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anychip.serve.api.errors import ApiError
from anychip.serve.api.keys import Keys
from anychip.serve.api.limits import Limits

OPEN_PATHS = ("/healthz",)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    # Nothing from elsewhere, no inline script or style, no string ever becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
}
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


class Door:
    """ASGI middleware. `hosts` are names beside localhost and plain addresses; `origins` may call from elsewhere."""

    def __init__(
        self, app: ASGIApp, keys: Keys, limits: Limits, hosts: Iterable[str] = (), origins: Iterable[str] = ()
    ) -> None:
        self.app, self.keys, self.limits = app, keys, limits
        self.hosts = frozenset(host.lower() for host in (*hosts, "localhost"))
        self.origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no websockets here
        headers = Headers(scope=scope)
        send = self._guarded_send(send, headers.get("origin"))
        try:
            self._check_host(headers)
            self._check_origin(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(scope, receive, send)
                return
            if scope["path"] not in OPEN_PATHS:
                scope["anychip.client"] = self._identify(scope, headers)
            body = await self._read_body(headers, receive)
            self._check_depth(body)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or (name not in self.hosts and not _is_address(name)):
            raise ApiError(403, "This server does not answer to that host name.", code="host_not_allowed")

    def _check_origin(self, headers: Headers) -> None:
        """A browser names the site whose script asks; programs name none."""
        origins = headers.getlist("origin")
        if not origins:
            return
        same = {f"{scheme}://{headers['host'].lower()}" for scheme in ("http", "https")}
        if len(origins) > 1 or (origins[0].lower() not in same and origins[0] not in self.origins):
            raise ApiError(403, "This server does not answer to pages of that origin.", code="origin_not_allowed")

    def _identify(self, scope: Scope, headers: Headers) -> str:
        if not self.keys:
            client = scope.get("client")
            return str(client[0]) if client else ""
        given = headers.getlist("authorization")
        name = self.keys.identify(given[0]) if len(given) == 1 else None
        if name is None:
            scheme = 'Basic realm="anychip", charset="UTF-8"' if scope["method"] == "GET" else "Bearer"
            raise ApiError(401, "Give a valid API key.", code="invalid_api_key", headers={"WWW-Authenticate": scheme})
        return name

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, whatever length it claims, or none: a limit on bytes and on seconds."""
        most = self.limits.body_bytes
        too_large = ApiError(413, f"The body is larger than {most:,} bytes.", code="body_too_large")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        body = bytearray()

        async def read() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "The body ended too soon.")
                body.extend(message.get("body", b""))
                if len(body) > most:
                    raise too_large
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "The body came too slowly.", code="timeout") from None
        return bytes(body)

    def _check_depth(self, body: bytes) -> None:
        depth = 0
        for match in _BRACKET.finditer(_STRING.sub(b"", body)):
            depth += 1 if match[0] in b"[{" else -1
            if depth > self.limits.json_depth:
                raise ApiError(400, f"The JSON is nested deeper than {self.limits.json_depth}.", code="invalid_json")

    def _guarded_send(self, send: Send, origin: str | None) -> Send:
        """Adds the headers of safety, and drops a reader that takes nothing."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if origin is not None and origin in self.origins:
                    headers["Access-Control-Allow-Origin"] = origin
                    headers["Cross-Origin-Resource-Policy"] = "cross-origin"
                    headers.add_vary_header("Origin")
            await asyncio.wait_for(send(message), self.limits.write_seconds)

        return guarded


async def _preflight(scope: Scope, receive: Receive, send: Send) -> None:
    from starlette.responses import Response

    headers = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "Authorization, Content-Type",
        "Access-Control-Max-Age": "600",
    }
    await Response(status_code=204, headers=headers)(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """What was read, once; then what really comes, which is the end of the connection."""
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _host_name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    if parts.username or parts.path or parts.query or parts.fragment:
        return None
    return parts.hostname


def _is_address(name: str) -> bool:
    """A plain address is typed, not resolved: no name of somebody else can stand for it."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
