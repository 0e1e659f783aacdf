"""Only who knows the token is heard, every message once and in its place, and nobody else does harm."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import InputError
from anychip.supervise.channel import LARGEST_MESSAGE_BYTES, ChannelError, Session, read_token
from anychip.supervise.wire import Client, Server

TOKEN = b"a token of enough bytes"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(st.text(max_size=8), VALUES, max_size=4), max_size=5)


def sent(session: Session) -> bytes:
    text = b""
    while waiting := bytes(session.waiting):
        text += waiting
        session.took(len(waiting))
    return text


def pair(client_token: bytes = TOKEN) -> tuple[Session, Session]:
    """Two ends that have greeted each other."""
    server, client = Session(TOKEN, is_server=True), Session(client_token, is_server=False)
    client.receive(sent(server))
    server.receive(sent(client))
    client.receive(sent(server))
    return server, client


@given(MESSAGES, st.integers(1, 50))
def test_messages_arrive_whole_and_in_order_however_the_bytes_are_cut(
    messages: list[dict[str, Any]], size: int
) -> None:
    server, client = pair()
    assert server.ready and client.ready
    for sender, receiver in ((client, server), (server, client)):
        for message in messages:
            sender.send(message)
        text = sent(sender)
        found = [m for at in range(0, len(text), size) for m in receiver.receive(text[at : at + size])]
        assert found == messages


def test_another_token_is_refused_by_both_ends() -> None:
    server, client = Session(TOKEN, is_server=True), Session(b"some other token here", is_server=False)
    client.receive(sent(server))
    with pytest.raises(ChannelError, match="token"):
        server.receive(sent(client))
    assert not server.ready
    false_server, client = Session(b"some other token here", is_server=True), Session(TOKEN, is_server=False)
    client.receive(sent(false_server))
    sent(client)
    with pytest.raises(ChannelError, match="token"):
        client.receive(json.dumps({"proof": "0" * 64}).encode() + b"\n")
    with pytest.raises(ChannelError):
        client.send({"kind": "join"})


def test_a_server_is_not_proved_by_what_the_client_said() -> None:
    """Reflection: the client's own proof sent back is none."""
    server, client = Session(TOKEN, is_server=True), Session(TOKEN, is_server=False)
    client.receive(sent(server))
    said = json.loads(sent(client))
    with pytest.raises(ChannelError):
        client.receive(json.dumps({"proof": said["proof"]}).encode() + b"\n")


def test_what_was_recorded_cannot_be_played_again_left_out_or_reordered() -> None:
    for change in (lambda a, b: [a, a], lambda a, b: [b], lambda a, b: [b, a]):
        server, client = pair()
        client.send({"n": 1})
        first = sent(client)
        client.send({"n": 2})
        with pytest.raises(ChannelError, match="place"):
            for line in change(first, sent(client)):
                server.receive(line)
    server, client = pair()
    client.send({"n": 1})
    recorded = sent(client)
    with pytest.raises(ChannelError):  # on another connection
        pair()[0].receive(recorded)
    with pytest.raises(ChannelError):  # sent back to where it came from
        client.receive(recorded)


@given(st.data())
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    server, client = pair()
    client.send({"kind": "ended", "generation": 12})
    text = bytearray(sent(client))
    at = data.draw(st.integers(0, len(text) - 2))
    text[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ChannelError):
        server.receive(bytes(text) + b"\n")


@settings(max_examples=500)
@given(st.lists(st.binary(max_size=700), max_size=4), st.booleans(), st.booleans())
def test_garbage_raises_nothing_else_and_is_no_message(chunks: list[bytes], is_server: bool, greeted: bool) -> None:
    session = pair()[0 if is_server else 1] if greeted else Session(TOKEN, is_server=is_server)
    try:
        for chunk in chunks:
            assert session.receive(chunk + b"\n") == []
    except ChannelError:
        pass


@pytest.mark.parametrize(
    "text", [b"[" * 400, b'{"nonce":' * 40, b'{"nonce": 5, "proof": null}', b'{"nonce": "\xc3\xa4"}']
)
def test_greetings_that_are_traps(text: bytes) -> None:
    with pytest.raises(ChannelError):
        Session(TOKEN, is_server=True).receive(text + b"\n")


def test_long_lines_are_refused_before_they_are_whole() -> None:
    with pytest.raises(ChannelError, match="long"):
        Session(TOKEN, is_server=True).receive(b"x" * 600)
    server, client = pair()
    with pytest.raises(ChannelError, match="long"):
        server.receive(b"x" * (LARGEST_MESSAGE_BYTES + 1))
    with pytest.raises(ChannelError, match="much"):
        client.send({"text": "x" * LARGEST_MESSAGE_BYTES})


def test_a_token_is_a_file_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(InputError, match="cannot be read"):
        read_token(path)
    path.write_text("0123456789abcdef0123\n")
    path.chmod(0o644)
    with pytest.raises(InputError, match="by others"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == b"0123456789abcdef0123"
    path.write_text("short\n")
    with pytest.raises(InputError, match="fewer"):
        read_token(path)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server("127.0.0.2", 0, TOKEN)
    yield server
    server.close()


def exchange(server: Server, *clients: Client, seconds: float = 5.0) -> list[dict[str, Any]]:
    """Run both ends until something has come to the server."""
    deadline, found = time.monotonic() + seconds, []
    while not found and time.monotonic() < deadline:
        for client in clients:
            client.poll(0.01)
            client.send({"from": id(client)})
        found = [message for _, message in server.poll(0.01)]
    return found


def test_the_server_listens_on_its_address_alone(server: Server) -> None:
    socket.create_connection(("127.0.0.2", server.port), timeout=2).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=2)


def test_strangers_garbage_and_the_slow_do_not_keep_a_friend_out(server: Server) -> None:
    place = ("127.0.0.2", server.port)
    idle = [socket.create_connection(place, timeout=2) for _ in range(100)]
    for at, sock in enumerate(idle[:60]):
        sock.sendall([b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00" * 50, b"x" * 4096][at % 3])
    false = Client(*place, b"not the token at all")
    client = Client(*place, TOKEN)
    assert exchange(server, false, client) == [{"from": id(client)}]
    assert not false.ready
    for sock in idle:
        sock.close()
    assert [message["from"] for message in exchange(server, client)] == [id(client)]


def test_one_that_never_greets_is_let_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anychip.supervise.wire._GREETING_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.2", server.port), timeout=2) as idle:
        deadline = time.monotonic() + 5
        idle.setblocking(False)
        data = b"-"
        while data and time.monotonic() < deadline:
            list(server.poll(0.02))
            try:
                data = idle.recv(1000)
            except BlockingIOError:
                continue
        assert data == b""


def test_a_name_is_looked_up_until_it_is_found_and_never_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the name service hangs no lease could be kept."""
    look_up, asked = socket.getaddrinfo, list[bool]()

    def late(host: str, *more: Any, **named: Any) -> list[Any]:
        asked.append(host == "coordinator")
        if len(asked) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "not yet")
        return look_up("127.0.0.2", *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    client = Client("coordinator", server.port, TOKEN)
    for times in (1, 2, 3):
        assert exchange(server, client)
        assert client.connected == times
        client.close()
    assert asked == [True, True]


def test_a_name_with_addresses_of_both_families(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of the family of this host's own address is taken."""
    look_up = socket.getaddrinfo

    def both(host: str, port: int, family: int = 0, *more: Any, **named: Any) -> list[Any]:
        if host != "coordinator":
            return look_up(host, port, family, *more, **named)
        found = [row for address in ("::1", "127.0.0.2") for row in look_up(address, port, 0, *more, **named)]
        return [row for row in found if family in (0, row[0])]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    for own in ("127.0.0.3", "localhost"):
        client = Client("coordinator", server.port, TOKEN, bind=own)
        assert exchange(server, client)
        client.close()


def test_a_client_comes_back_by_itself(server: Server) -> None:
    client = Client("127.0.0.2", server.port, TOKEN)
    assert exchange(server, client)
    port = server.port
    server.close()
    again = Server("127.0.0.2", port, TOKEN)
    assert exchange(again, client)
    assert client.connected == 2
    again.close()
