"""Who comes in, how much they may bring, how long they may take, and what they are told."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from anychip.errors import InputError
from anychip.serve import serve as serve_module
from anychip.serve.api.keys import Keys, read_keys
from anychip.serve.api.limits import Limits
from anychip.serve.api.server import listen, make_server

from .conftest import Serve, Served

KEY, OTHER = "k" * 24, "another-key-of-length"
ASK = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}
PATHS = ["/", "/page/chat.js", "/v1/models", "/metrics", "/openapi.json", "/nothing"]


@pytest.fixture(scope="module")
def locked(serve: Serve) -> Served:
    limits = Limits(body_bytes=4096, body_seconds=1.0, header_seconds=1.0, json_depth=20, queue=2, per_key=3)
    return serve([KEY, OTHER], limits, origins=["https://friend.example"], hosts=["model.example"])


def bearer(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", ["", "Bearer wrong", "Bearer", f"Token {KEY}", f"Bearer {KEY}x", "Basic !!"])
def test_nobody_comes_in_without_a_key(locked: Served, path: str, header: str) -> None:
    found = locked.get(path, headers={"Authorization": header} if header else {})
    assert found.status_code == 401
    assert found.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in found.text
    assert locked.post("/v1/chat/completions", ASK).status_code == 401


def test_every_key_opens_and_health_needs_none(locked: Served) -> None:
    for key in (KEY, OTHER):
        assert locked.get("/v1/models", headers=bearer(key)).status_code == 200
    basic = base64.b64encode(f"person:{KEY}".encode()).decode()
    assert locked.get("/", headers={"Authorization": f"Basic {basic}"}).status_code == 200, "as a browser sends it"
    assert locked.get("/").headers["www-authenticate"].startswith("Basic")
    assert locked.get("/healthz").json() == {"status": "ok"}


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n")
    assert read_keys(file).identify(f"Bearer {KEY}") == "key 0"
    monkeypatch.setenv("ANYCHIP_API_KEYS", f"{KEY},{OTHER}")
    assert read_keys(None).identify(f"Bearer {OTHER}") == "key 1"
    monkeypatch.delenv("ANYCHIP_API_KEYS")
    assert not read_keys(None)
    for text in ("", "short\n"):
        file.write_text(text)
        with pytest.raises(InputError):
            read_keys(file)


def test_an_open_server_without_keys_is_refused(served: Served) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(InputError, match="no API key"):
            make_server(served.service, Keys([]), host, 0)


def test_the_verb_says_what_is_missing(served: Served, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no API key"):
        serve_module.serve(tmp_path, host="0.0.0.0")
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {served.port}"):
        listen("127.0.0.1", served.port)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "a@localhost", "", "localhost/x", "[::1"])
def test_other_host_names_are_refused(served: Served, host: str) -> None:
    found = served.get("/v1/models", headers={"Host": host})
    assert found.status_code in (400, 403)
    assert served.get("/healthz", headers={"Host": host}).status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:99", "[::1]:8000", "LOCALHOST:1", "model.example"])
def test_own_names_and_addresses_are_answered(locked: Served, host: str) -> None:
    assert locked.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "https://friend.example.evil"]
)
def test_pages_of_other_sites_are_refused(locked: Served, origin: str) -> None:
    found = locked.post("/v1/chat/completions", ASK, headers={**bearer(), "Origin": origin})
    assert found.status_code == 403
    assert "access-control-allow-origin" not in found.headers
    preflight = httpx.options(
        f"{locked.url}/v1/chat/completions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 403


def test_named_origins_and_our_own_page_may_call(locked: Served) -> None:
    headers = {**bearer(), "Origin": "https://friend.example"}
    found = locked.post("/v1/chat/completions", ASK, headers=headers)
    assert found.status_code == 200
    assert found.headers["access-control-allow-origin"] == "https://friend.example"
    headers = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{locked.url}/v1/chat/completions", headers=headers).status_code == 204
    assert locked.get("/v1/models", headers={**bearer(), "Origin": locked.url}).status_code == 200


def test_large_bodies_are_refused_with_and_without_a_length(locked: Served) -> None:
    large = json.dumps({**ASK, "user": "x" * 5000}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    for content in (large, pieces()):
        found = httpx.post(f"{locked.url}/v1/chat/completions", content=content, headers=bearer())
        assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")


def test_deep_json_is_refused_and_brackets_in_strings_are_text(locked: Served) -> None:
    deep = b'{"messages": ' + b"[" * 30 + b"]" * 30 + b"}"
    found = httpx.post(f"{locked.url}/v1/chat/completions", content=deep, headers=bearer())
    assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_json")
    body = {**ASK, "messages": [{"role": "user", "content": '[[[["{{{{' * 10}]}
    assert locked.post("/v1/chat/completions", body, headers=bearer()).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"messages": NaN}', b'"x"', b"\0" * 10])
def test_bodies_that_are_no_request(locked: Served, content: bytes) -> None:
    headers = {**bearer(), "Content-Type": "application/json"}
    found = httpx.post(f"{locked.url}/v1/chat/completions", content=content, headers=headers)
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_slow_connections_end_and_harm_nobody(locked: Served) -> None:
    """Forty that send half a header, forty that send half a body; service goes on; all are closed."""
    slow = []
    for number in range(80):
        connection = socket.create_connection(("127.0.0.1", locked.port), timeout=20)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        rest = "Content-Length: 100\r\n\r\n{" if number % 2 else "X-Slow:"
        connection.sendall((head + rest).encode())
        slow.append(connection)
    assert locked.post("/v1/chat/completions", ASK, headers=bearer()).status_code == 200
    started = time.monotonic()
    for number, connection in enumerate(slow):
        answer = b""
        while data := connection.recv(4096):
            answer += data
            if b"\r\n\r\n" in answer and b"timeout_error" in answer:
                break
        assert (b" 408 " in answer) == bool(number % 2)
        connection.close()
    assert time.monotonic() - started < 15


def test_too_many_answers_are_sent_away_and_come_back(serve: Serve) -> None:
    """Room for one answer and two waiting; more hear 429 and when to try again."""
    full = serve(limits=Limits(queue=2), max_batch=1)
    ask = {**ASK, "max_tokens": 1500, "logit_bias": {"2": -100, "4": -100, "6": -100}}
    with httpx.Client(timeout=60) as client:
        streams = [
            client.send(
                client.build_request("POST", f"{full.url}/v1/chat/completions", json={**ask, "stream": True}),
                stream=True,
            )
            for _ in range(3)
        ]
        assert [one.status_code for one in streams] == [200] * 3
        found = full.post("/v1/chat/completions", ASK)
        assert found.status_code == 429
        assert int(found.headers["retry-after"]) >= 1
        assert found.json()["error"]["type"] == "rate_limit_error"
        for one in streams:
            one.close()  # hanging up frees the place at once
    for _ in range(100):
        found = full.post("/v1/chat/completions", ASK)
        if found.status_code == 200:
            break
        time.sleep(0.05)
    assert found.status_code == 200
    assert full.service.worker.load == 0


def test_hanging_up_ends_the_answer(serve: Serve) -> None:
    served = serve()
    ask = {**ASK, "max_tokens": 1900, "logit_bias": {"2": -100, "4": -100, "6": -100}}
    for stream in (True, False):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            body = json.dumps({**ask, "stream": stream})
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            connection.sendall((head + body).encode())
            _until(lambda: len(served.service.worker.batch.running) == 1)
        _until(lambda: served.service.worker.load == 0 and not served.service.worker.batch.running)


def _until(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answers_carry_the_headers_of_safety(served: Served) -> None:
    for path in ("/", "/v1/models", "/nothing"):
        headers = served.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "img-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "server" not in headers


@pytest.mark.parametrize(
    "path", ["/page/../serve.py", "/page/%2e%2e/serve.py", "/page/..%2fserve.py", "/page/x", "/%00"]
)
def test_only_the_files_of_the_page_are_given_out(served: Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert answer.split()[1] in (b"404", b"400")
    assert b"anychip/" not in answer and b"/serve" not in answer.partition(b"\r\n\r\n")[2]


def test_a_failure_inside_tells_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()

    def broken(*given: object, **named: object) -> None:
        raise RuntimeError("secret /home/path")

    monkeypatch.setattr("anychip.serve.api.chat.encode_conversation", broken)
    found = served.post("/v1/chat/completions", ASK)
    assert found.status_code == 500
    assert "secret" not in found.text and found.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    monkeypatch.setattr(served.service.worker.batch, "step", broken)
    found = served.post("/v1/chat/completions", ASK)
    assert (found.status_code, found.json()["error"]["code"]) == (500, "model_error")
    assert served.post("/v1/chat/completions", ASK).status_code == 200, "the engine goes on"


def test_metrics_count(served: Served) -> None:
    served.post("/v1/chat/completions", ASK)
    text = served.get("/metrics").text
    assert 'anychip_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "anychip_time_to_first_token_seconds_bucket" in text
    for number in range(3):
        served.get(f"/made/up/{number}")
    assert "made" not in served.get("/metrics").text


def test_schemas_that_ask_too_much_end(served: Served) -> None:
    """Nested repetitions and huge enumerations: refused in time, while others are served."""
    hostile = [
        {"type": "string", "pattern": "(((a{1,300}){1,300}){1,300}){1,300}"},
        {"type": "string", "pattern": "(?=x)["},
        {"enum": [f"{n:0>200}" for n in range(400)]},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"$ref": "#"},
    ]
    others = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            started = time.monotonic()
            assert served.post("/v1/chat/completions", ASK).status_code == 200
            others.append(time.monotonic() - started)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        for schema in hostile:
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            found = served.post("/v1/chat/completions", {**ASK, "response_format": form})
            assert found.status_code in (200, 400), found.text
    finally:
        stop.set()
        thread.join()
    assert max(others) < 15
