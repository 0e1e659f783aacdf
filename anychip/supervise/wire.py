"""Sockets under the channel: a server for many ends and a client for one; one thread, nothing ever blocks."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any

from anychip.launch.sockets import listen
from anychip.supervise.channel import ChannelError, Session

_GREETING_SECONDS = 5.0  # to prove the token in
_MOST_STRANGERS = 256  # connections that have not proved it yet; the oldest goes first
_READ_BYTES = 1 << 16


class Connection:
    """A socket and its session. `heard` is time.monotonic of the last bytes that made sense."""

    def __init__(self, sock: socket.socket, token: bytes, *, is_server: bool) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._session = sock, Session(token, is_server=is_server)
        self.opened = self.heard = time.monotonic()
        self.is_open = True
        self._selector: selectors.BaseSelector | None = None

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Let the selector tell when there is something to read, and to write while something waits for it."""
        if self._selector is None:
            self._selector = selector
            selector.register(self.socket, _wanted(self), self)
        elif selector.get_key(self.socket).events != _wanted(self):
            selector.modify(self.socket, _wanted(self), self)

    @property
    def ready(self) -> bool:
        return self.is_open and self._session.ready

    @property
    def has_waiting(self) -> bool:
        return self.is_open and bool(self._session.waiting)

    def send(self, message: dict[str, Any]) -> None:
        """Closes the connection when the other end does not take what it is sent."""
        try:
            self._session.send(message)
        except ChannelError:
            self.close()
        else:
            self.write()

    def write(self) -> None:
        try:
            while self.is_open and (waiting := self._session.waiting):
                self._session.took(self.socket.send(waiting))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()

    def read(self) -> list[dict[str, Any]]:
        """What has arrived; closes the connection at its end and when it makes no sense."""
        if not self.is_open:
            return []
        try:
            data = self.socket.recv(_READ_BYTES)
            messages = self._session.receive(data) if data else []
        except (BlockingIOError, InterruptedError):
            return []
        except (OSError, ChannelError):
            self.close()
            return []
        if not data:
            self.close()
            return []
        self.heard = time.monotonic()
        self.write()
        return messages

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            if self._selector is not None:
                self._selector.unregister(self.socket)
            self.socket.close()


class Server:
    """Listens on one address. Raises OSError when it is taken."""

    def __init__(self, address: str, port: int, token: bytes) -> None:
        self._token = token
        self._listener = listen(address, port)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._strangers: list[Connection] = []
        self._friends: list[Connection] = []

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def poll(self, seconds: float) -> Iterator[tuple[Connection, dict[str, Any]]]:
        """Wait so long for something to happen; what came, and from whom."""
        self._drop()
        for known in [*self._strangers, *self._friends]:
            known.watch(self._selector)
        for key, events in self._selector.select(seconds):
            if key.data is None:
                self._accept()
                continue
            connection: Connection = key.data
            if events & selectors.EVENT_WRITE:
                connection.write()
            if events & selectors.EVENT_READ:
                for message in connection.read():
                    yield connection, message

    def close(self) -> None:
        for connection in [*self._strangers, *self._friends]:
            connection.close()
        self._selector.close()
        self._listener.close()

    def flush(self, seconds: float) -> None:
        """Give the other ends so long to take what they were sent."""
        deadline = time.monotonic() + seconds
        while any(connection.has_waiting for connection in self._friends) and time.monotonic() < deadline:
            for connection in self._friends:
                connection.write()
            time.sleep(0.01)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # none is left, or no descriptor for it
                return
            connection = Connection(sock, self._token, is_server=True)
            connection.write()
            self._strangers.append(connection)

    def _drop(self) -> None:
        self._friends = [c for c in [*self._friends, *(s for s in self._strangers if s.ready)] if c.is_open]
        self._strangers = [c for c in self._strangers if c.is_open and not c.ready]
        late = time.monotonic() - _GREETING_SECONDS
        for at, connection in enumerate(self._strangers):
            if connection.opened < late or at < len(self._strangers) - _MOST_STRANGERS:
                connection.close()
        self._strangers = [c for c in self._strangers if c.is_open]


class Client:
    """Reaches a server, again and again when it must; without a connection messages are dropped.

    Its name is looked up once: where the network is cut that may take longer than a lease.
    """

    def __init__(self, host: str, port: int, token: bytes, bind: str | None = None) -> None:
        self._place, self._token, self._bind = (host, port), token, bind
        self._found: tuple[int, int, Any] | None = None  # family, kind and address of the server
        self._connection: Connection | None = None
        self._try_at, self._wait = 0.0, _FIRST_WAIT_SECONDS
        self.connected = 0  # how often a connection was made

    @property
    def ready(self) -> bool:
        return self._connection is not None and self._connection.ready

    @property
    def silent_seconds(self) -> float:
        """Since anything came through the connection there is; 0 without one."""
        return time.monotonic() - self._connection.heard if self._connection is not None and self.ready else 0.0

    def send(self, message: dict[str, Any]) -> None:
        if self._connection is not None and self._connection.ready:
            self._connection.send(message)

    def poll(self, seconds: float) -> list[dict[str, Any]]:
        """Wait so long for something to come."""
        connection = self._living()
        if connection is None:
            time.sleep(seconds)
            return []
        was_ready = connection.ready
        with selectors.DefaultSelector() as selector:
            selector.register(connection.socket, _wanted(connection))
            happened = selector.select(seconds)
        messages = []
        for _, events in happened:
            if events & selectors.EVENT_WRITE:
                connection.write()
            if events & selectors.EVENT_READ:
                messages += connection.read()
        if connection.ready and not was_ready:
            self.connected += 1
            self._wait = _FIRST_WAIT_SECONDS
        return messages

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _living(self) -> Connection | None:
        connection, now = self._connection, time.monotonic()
        if connection is not None and connection.is_open:
            if connection.ready or now - connection.opened < _GREETING_SECONDS:
                return connection
            connection.close()
        if now < self._try_at:
            return None
        self._try_at, self._wait = now + self._wait, min(2 * self._wait, _LONGEST_WAIT_SECONDS)
        self._connection = self._connect()
        return self._connection

    def _connect(self) -> Connection | None:
        try:
            self._found = self._found or _look_up(*self._place, self._bind)
            family, kind, address = self._found
            sock = socket.socket(family, kind)
        except OSError:
            return None
        try:
            if self._bind is not None:
                sock.bind((self._bind, 0))
            sock.setblocking(False)
            sock.connect(address)
        except BlockingIOError:
            pass
        except OSError:
            sock.close()
            return None
        return Connection(sock, self._token, is_server=False)


def _look_up(host: str, port: int, bind: str | None) -> tuple[int, int, Any]:
    """Family, kind and address of a server, reached from `bind`: a name may have addresses of both families."""
    own = socket.AF_UNSPEC if bind is None else socket.getaddrinfo(bind, 0)[0][0]
    family, kind, _, _, address = socket.getaddrinfo(host, port, own, socket.SOCK_STREAM)[0]
    return family, kind, address


_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 1.0


def _wanted(connection: Connection) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.has_waiting else 0)
