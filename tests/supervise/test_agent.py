"""What an agent does when told, and when nobody tells it anything any more. Its processes only sleep."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from many_hosts import wait_for

from anychip.rundir import RunDirectory
from anychip.supervise.agent import Agent, Host
from anychip.supervise.processes import Generation
from anychip.supervise.run import RunFailed, Stop
from anychip.supervise.watch import process_state
from anychip.supervise.wire import Client, Connection, Server

TOKEN = b"sixteen bytes or more"
_SLEEPS = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[1], os.environ["RANK"] + ".json")
out.with_suffix(".new").write_text(json.dumps(dict(os.environ)))
out.with_suffix(".new").rename(out)
time.sleep(300)
"""


class Coordinator:
    """The other end: answers reports while `answers`, and keeps the last of them."""

    def __init__(self, folder: Path) -> None:
        self.server = Server("127.0.0.1", 0, TOKEN)
        self.report: dict[str, Any] = {"generation": 0, "ranks": []}
        self.connection: Connection | None = None
        self.joins, self.heard = 0, list[dict[str, Any]]()
        self.join: dict[str, Any] = {}
        self.leaving: dict[str, Any] | None = None
        self.answers, self.lease = True, 2.0
        self.run, self.stop, self.ended = RunDirectory(folder / "run"), Stop(), "not yet"
        client = Client("127.0.0.1", self.server.port, TOKEN)
        host = Host("here", "127.0.0.1", 2)
        command = [sys.executable, "-c", _SLEEPS, str(folder)]
        self.agent = Agent(host, self.run, command, client, "job", self.stop, None, 60.0)
        self.thread = threading.Thread(target=self._be_agent, daemon=True)
        self.thread.start()

    def _be_agent(self) -> None:
        try:
            self.agent.run()
            self.ended = "well"
        except RunFailed as error:
            self.ended = str(error.exit_code)

    def until(self, condition: Any) -> Any:
        def heard() -> Any:
            for connection, message in self.server.poll(0.01):
                if message["kind"] == "join":
                    self.joins, self.join = self.joins + 1, message
                if message["kind"] == "leaving":
                    self.leaving = message
                self.connection = connection
                self.heard.append(message)
                if message["kind"] == "report":
                    self.report = message
                if self.answers and "sent" in message:
                    connection.send({"kind": "answer", "sent": message["sent"], "lease": self.lease})
            return condition()

        return wait_for(heard, 60)

    def say(self, kind: str, **more: Any) -> None:
        assert self.connection is not None
        self.connection.send({"kind": kind, **more})

    def start(self, generation: int) -> None:
        self.say("start", generation=generation, first_rank=4, world_size=8, host_number=2, hosts=4,
                 address="127.0.0.9", port=4321, prefix="secret")  # fmt: skip

    def pids(self) -> list[int]:
        return [row["pid"] for row in self.report["ranks"]]


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path)
    coordinator.until(lambda: coordinator.joins == 1)
    yield coordinator
    coordinator.stop.signals += 2
    coordinator.thread.join(timeout=30)
    coordinator.server.close()


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if process_state(pid) not in ("", "Z")]


def test_processes_are_told_where_they_stand(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.start(7)
    coordinator.until(lambda: (tmp_path / "4.json").exists() and (tmp_path / "5.json").exists())
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (4, 5)]
    assert [one["LOCAL_RANK"] for one in told] == ["0", "1"]
    for rank, one in zip((4, 5), told, strict=True):
        expected = {
            "RANK": str(rank), "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "2", "GROUP_WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.9", "MASTER_PORT": "4321", "ANYCHIP_STORE_PREFIX": "secret",
        }  # fmt: skip
        assert expected.items() <= one.items()
        assert "sixteen bytes" not in "".join(one.values())  # the token stays with the agent


def test_processes_that_the_disk_has_no_room_to_start_are_reported_and_the_agent_lives(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "logs")

    with monkeypatch.context() as patch:
        patch.setattr("anychip.supervise.agent.Generation", full)
        coordinator.start(7)
        coordinator.until(lambda: coordinator.report["generation"] == 7)
    rows = coordinator.report["ranks"]
    assert [(row["rank"], row["code"], row["kind"]) for row in rows] == [(4, 5, "disk"), (5, 5, "disk")]
    assert "No space left" in rows[0]["lines"][-1]
    coordinator.say("end", generation=7)
    coordinator.until(lambda: coordinator.report["generation"] == 0)
    coordinator.start(8)
    coordinator.until(lambda: len(alive(coordinator.pids())) == 2)


def test_without_answers_its_processes_end_with_the_lease_and_not_before(coordinator: Coordinator) -> None:
    coordinator.start(7)
    coordinator.until(lambda: len(alive(coordinator.pids())) == 2)
    pids, coordinator.answers = coordinator.pids(), False
    cut = time.monotonic()
    coordinator.until(lambda: time.monotonic() > cut + 1.0)
    assert alive(pids) == pids
    coordinator.until(lambda: not alive(pids))
    coordinator.until(lambda: coordinator.report["generation"] == 0)
    coordinator.answers = True
    heard = time.monotonic()
    coordinator.until(lambda: time.monotonic() > heard + 0.5)
    coordinator.start(7)
    coordinator.start(6)
    coordinator.until(lambda: time.monotonic() > heard + 1.5)
    assert coordinator.report["generation"] == 0  # a generation that is over does not come back
    coordinator.start(8)
    coordinator.until(lambda: coordinator.report["generation"] == 8)


def test_a_lease_that_ends_during_a_start_is_told_though_no_process_was(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*given: Any) -> Generation:
        time.sleep(2 * coordinator.lease)
        return Generation(*given)

    monkeypatch.setattr("anychip.supervise.agent.Generation", slow)
    coordinator.lease = 0.5
    coordinator.until(lambda: len(coordinator.heard) > 5)
    coordinator.start(7)
    (told,) = coordinator.until(lambda: [message for message in coordinator.heard if message["kind"] == "ended"])
    assert told["generation"] == 7
    assert coordinator.joins == 1
    assert all(message["generation"] == 0 for message in coordinator.heard if message is not told)


def test_one_that_comes_back_after_its_lease_says_first_who_it_is_and_that_it_runs_nothing(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll = Client.poll

    def late(client: Client, seconds: float) -> list[dict[str, Any]]:
        before, messages = client.connected, poll(client, seconds)
        if client.connected > before:
            time.sleep(coordinator.lease + 0.1)
        return messages

    coordinator.start(7)
    coordinator.until(lambda: len(alive(coordinator.pids())) == 2)
    monkeypatch.setattr(Client, "poll", late)
    coordinator.heard.clear()
    assert coordinator.connection is not None
    coordinator.connection.close()
    coordinator.until(lambda: coordinator.heard)
    assert (coordinator.heard[0]["kind"], coordinator.heard[0]["generation"]) == ("join", 0)


def test_a_broken_connection_within_the_lease_ends_nothing(coordinator: Coordinator) -> None:
    coordinator.lease = 30.0
    coordinator.start(7)
    coordinator.until(lambda: len(alive(coordinator.pids())) == 2)
    pids = coordinator.pids()
    assert coordinator.connection is not None
    coordinator.connection.close()
    coordinator.until(lambda: coordinator.joins == 2)
    coordinator.until(lambda: coordinator.report["generation"] == 7)
    assert alive(pids) == pids == coordinator.pids()


@pytest.mark.parametrize("beside_the_coordinator", [False, True])
def test_who_is_to_leave_is_said_again_on_a_new_connection(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, beside_the_coordinator: bool
) -> None:
    if beside_the_coordinator:
        monkeypatch.setattr(coordinator.agent, "_coordinator", MagicMock(**{"keep_alive.return_value": None}))
    coordinator.stop.signals = 1
    coordinator.until(lambda: coordinator.leaving is not None)
    assert coordinator.leaving is not None and coordinator.leaving["all"] == beside_the_coordinator
    assert coordinator.connection is not None
    coordinator.connection.close()
    coordinator.until(lambda: coordinator.joins == 2)
    assert coordinator.join["leaving"] and coordinator.join["all"] == beside_the_coordinator


def test_a_second_request_acts_at_once_and_leaves_nothing(coordinator: Coordinator) -> None:
    coordinator.start(7)
    coordinator.until(lambda: len(alive(coordinator.pids())) == 2)
    pids = coordinator.pids()
    coordinator.stop.signals = 2
    coordinator.until(lambda: coordinator.ended == "130")
    assert not alive(pids)


def test_a_host_that_was_cut_off_when_training_ended_goes_home(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anychip.supervise.agent._SILENT_SECONDS", 0.5)
    coordinator.server.close()
    wait_for(lambda: not coordinator.agent._client.ready, 30)
    assert coordinator.ended == "not yet"
    coordinator.run.finish("train", {"step": 1})
    wait_for(lambda: coordinator.ended == "well", 30)
