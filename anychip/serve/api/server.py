"""`anychip serve`: a listening socket, connections with time limits, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from anychip.errors import InputError
from anychip.serve.api.app import make_app
from anychip.serve.api.keys import Keys, check_open
from anychip.serve.api.service import Service

_MOST_HEADER_BYTES = 32 << 10


def run_server(
    service: Service,
    keys: Keys,
    *,
    host: str,
    port: int,
    hosts: Sequence[str],
    origins: Sequence[str],
    drain_seconds: int,
    page: bool = True,
) -> None:
    """Serve until SIGTERM or Ctrl-C; then refuse new requests, finish running answers for `drain_seconds`, return."""
    server = make_server(service, keys, host, port, hosts, origins, drain_seconds, page)
    with listen(host, port) as listening:
        server.run(sockets=[listening])


def make_server(
    service: Service,
    keys: Keys,
    host: str,
    port: int,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    drain_seconds: int = 30,
    page: bool = True,
) -> uvicorn.Server:
    """A server that has not started. InputError where it would be open to everybody."""
    check_open(host, bool(keys))
    app = make_app(service, keys, hosts=(*hosts, host), origins=origins, page=page)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_timed_protocol(service.limits.header_seconds),
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        backlog=1024,
        limit_concurrency=service.limits.connections,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=drain_seconds,
    )
    return _Server(config, service)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, or InputError for an address that is not ours or in use."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}, port {port} ({error.strerror}).",
            where="serve",
            do="Choose another --port or --host.",
        ) from None
    return listening


class _Server(uvicorn.Server):
    """Says where it listens, marks the service as draining, and ends with exit code 0 on SIGTERM."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started and self.servers:
            address = self.servers[0].sockets[0].getsockname()
            name = f"[{address[0]}]" if ":" in address[0] else address[0]
            print(f"{self._service.name} at http://{name}:{address[1]}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        if self.should_exit:  # a second signal does not wait
            self.force_exit = True
        else:
            print("ending: running answers are finished, new requests refused", file=sys.stderr, flush=True)
        self._service.draining = True
        self.should_exit = True


def _timed_protocol(seconds: float) -> type[H11Protocol]:
    class TimedProtocol(H11Protocol):
        """Closes a connection whose request header does not arrive in time, the first and every later one."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, self._expire)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self._expire)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _expire(self) -> None:
            self._timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol
