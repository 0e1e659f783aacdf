"""Many clients, some of them bad, and requests made up at random: the server stands, and good clients get the truth."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from anychip.serve.api.limits import Limits

from .conftest import Serve, Served

BANNED = {"2": -100, "4": -100, "6": -100}


def resident(process: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Crowd:
    """Clients that ask well, hang up, send too much or dawdle, until told to end."""

    def __init__(self, url: str) -> None:
        self.url, self.stop, self.reconnected = url, threading.Event(), 0
        questions = [f"question {number} on the cat" for number in range(12)]
        self.right = {question: self.answer(httpx.Client(timeout=600), question) for question in questions}
        self.answered = 0
        self.wrong: list[str] = []

    def answer(self, client: httpx.Client, question: str) -> str:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 8}
        for _ in range(20_000):
            try:
                found = client.post(f"{self.url}/v1/chat/completions", json=body)
            except (httpx.ReadError, httpx.RemoteProtocolError):
                self.reconnected += 1  # an idle connection, or a reader that was starved, is closed: clients ask again
                continue
            if found.status_code != 429:
                return str(found.json()["choices"][0]["message"]["content"])
            time.sleep(0.05)
        raise AssertionError("never admitted")

    def good(self, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(timeout=600) as client:
            while not self.stop.is_set():
                question = chance.choice(list(self.right))
                try:
                    said = self.answer(client, question)
                except Exception as error:
                    self.wrong.append(repr(error))
                    return
                if said != self.right[question]:
                    self.wrong.append(f"{question}: {said!r}")
                self.answered += 1
                time.sleep(chance.random() * 0.05)

    def bad(self, seed: int) -> None:
        chance = random.Random(seed)
        url = f"{self.url}/v1/chat/completions"
        while not self.stop.is_set():
            kind = chance.randrange(3)
            try:
                if kind == 0:  # hang up in the middle
                    body = {"messages": [{"role": "user", "content": "x" * chance.randrange(100)}], "stream": True}
                    with httpx.stream("POST", url, json={**body, "max_tokens": 400, "logit_bias": BANNED}) as stream:
                        for number, _ in enumerate(stream.iter_raw()):
                            if number > chance.randrange(5):
                                break
                elif kind == 1:  # too much
                    httpx.post(url, content=b"x" * chance.choice((100, 2 << 20)), timeout=10)
                else:  # too slow

                    def dawdle() -> object:
                        yield b"{"
                        time.sleep(chance.random() * 2)

                    httpx.post(url, content=dawdle(), timeout=10)  # type: ignore[arg-type]
            except httpx.HTTPError:
                pass
            time.sleep(chance.random() * 0.1)

    def run(self, good: int, bad: int, seconds: float, process: int) -> list[int]:
        """Let them loose; bytes of memory of the server's process at each tenth of the time."""
        threads = [threading.Thread(target=self.good, args=(seed,)) for seed in range(good)]
        threads += [threading.Thread(target=self.bad, args=(seed,)) for seed in range(bad)]
        for thread in threads:
            thread.start()
        memory = []
        for _ in range(10):
            time.sleep(seconds / 10)
            memory.append(resident(process))
        self.stop.set()
        for thread in threads:
            thread.join(600)
        mebibytes = [one >> 20 for one in memory]
        print(
            f"\n{self.answered} right answers, {self.reconnected} asked again; memory at each tenth, MiB: {mebibytes}"
        )
        assert self.wrong == []
        assert httpx.get(f"{self.url}/healthz", timeout=60).status_code == 200
        deadline = time.monotonic() + 120
        while not {"anychip_running 0.0", "anychip_waiting 0.0"} <= self.metrics():
            assert time.monotonic() < deadline, "an answer nobody waits for is still running"
            time.sleep(0.05)
        return memory

    def metrics(self) -> set[str]:
        return set(httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines())


def test_a_crowd_with_bad_clients(serve: Serve) -> None:
    served = serve(limits=Limits(queue=60, per_key=64, body_seconds=1.0), max_batch=8, context=512)
    found = Crowd(served.url)
    found.run(12, 12, 5, os.getpid())
    assert found.answered >= 12, "each good client has been answered"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_clients_for_five_minutes(serve: Serve, tmp_path: Path) -> None:
    """The server has a process of its own, so that its memory is not that of the clients."""
    serve().service.talker.tokenizer.save(tmp_path)
    with server(tmp_path, queue=60, max_batch=8) as (process, url):
        found = Crowd(url)
        memory = found.run(100, 100, 300, process.pid)
    assert found.answered > 200
    assert memory[-1] - memory[4] < 64 << 20, "memory is flat once it is warm"


def fuzz(served: Served, cases: int) -> None:
    """Schemathesis against the document that the server gives out."""
    program = f"""
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, load_all_checks
load_all_checks()
# What a schema cannot say is refused with 400: a prompt beyond the context, a name of no function, an unknown model.
CHECKS_LEFT = [check for check in CHECKS.get_all() if check.__name__ != "positive_data_acceptance"]
schema = schemathesis.openapi.from_url("{served.url}/openapi.json")
seen = [0]
@schema.parametrize()
@settings(max_examples={cases}, deadline=None, derandomize=True, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))
def test_api(case):
    seen[0] += 1
    case.call_and_validate(timeout=60, checks=CHECKS_LEFT)
def test_count():
    print("cases", seen[0])
"""
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"anychip_fuzz_{os.getpid()}.py"
    file.write_text(program, encoding="utf-8")
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-o", "addopts=", str(file)],
            capture_output=True,
            text=True,
            cwd=file.parent,
        )
    finally:
        file.unlink()
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.mark.timeout(240)
def test_made_up_requests_do_not_break_the_server(serve: Serve) -> None:
    pytest.importorskip("schemathesis")
    fuzz(serve(context=128), 8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_made_up_requests(serve: Serve) -> None:
    pytest.importorskip("schemathesis")
    fuzz(serve(context=128), 3400)


_SERVER = """
import sys
sys.path.insert(0, {tests!r})
from serve.api.conftest import tiny_decoder
from serve.conftest import Loaded
from pathlib import Path
from anychip.data.tokenizer import load_tokenizer
from anychip.recipe.schema import SamplingConfig
from anychip.serve import serve, talker
loaded = Loaded(tiny_decoder(2048), load_tokenizer(Path({tokenizer!r})), SamplingConfig())
serve.open_talker = lambda path, sampling, weights, **engine: talker.make_talker(loaded, sampling, weights, **engine)
serve.serve(Path("model"), port=0, **{options!r})
"""


@contextmanager
def server(folder: Path, **options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A tiny model behind `anychip serve` in a process of its own, with the tokenizer in a folder."""
    code = _SERVER.format(tests=str(Path(__file__).parents[2]), tokenizer=str(folder), options=options)
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("drain", [30, 0])
def test_sigterm_finishes_what_is_running(serve: Serve, tmp_path: Path, drain: int) -> None:
    """A running stream goes on to its end (or to the end of the time), then the process ends with code 0."""
    serve().service.talker.tokenizer.save(tmp_path)
    with server(tmp_path, drain_seconds=drain) as (process, url):
        body = {"messages": [{"role": "user", "content": "the cat"}], "stream": True}
        body |= {"max_tokens": 1500, "logit_bias": BANNED}
        lines = []
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json={**body, "logit_bias": BANNED}, timeout=60
        ) as stream:
            try:
                for line in stream.iter_lines():
                    if line and not lines:
                        process.send_signal(signal.SIGTERM)
                    lines += [line] if line else []
            except httpx.RemoteProtocolError:
                assert drain == 0
        if drain:
            assert lines[-1] == "data: [DONE]"
            assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")
