"""A disk that takes nothing ends no run: what happened is kept in memory, starts are tried again, and both succeed when
there is room."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hosts import Script, World
from many_hosts import wait_for
from tiny_run import prepare_and_run

from anychip.errors import EXIT_DISK
from anychip.rundir import RunDirectory
from anychip.supervise import record
from anychip.supervise.lines import Lines
from anychip.supervise.one_host import OneHost
from anychip.supervise.processes import Generation, Place, heartbeat_folder
from anychip.supervise.run import Limits, RunFailed, Stop, Supervisor
from anychip.train.checkpoint import CheckpointStore
from anychip.train.heartbeat import Heartbeat
from anychip.train.heartbeat_page import PageWriter

STEPS, PAGE = 40, 4096
SETTINGS = [f"training.steps={STEPS}", "training.eval_interval=0", "checkpoint.save_interval=10", "checkpoint.keep=2"]
WORDS = ["supervise", "tiny.yaml", "--processes", "2", *(word for each in SETTINGS for word in ("--set", each))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared run `tiny` that two supervised processes trained in peace; `prepared` is how it was before."""
    return prepare_and_run(tmp_path_factory.mktemp("full"), *WORDS)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.decode()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Until not a page is left, whatever was freed since the last call."""
    with (disk / "filler").open("ab", buffering=0) as handle:
        try:
            while handle.write(bytes(PAGE)) == PAGE:
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def beat(run: Path, rank: int) -> dict[str, Any]:
    paths = sorted((run / "logs" / "heartbeats").glob(f"generation-*/rank-{rank:05d}"))
    try:
        return dict(json.loads(paths[-1].read_text()))
    except (IndexError, OSError, ValueError):
        return {"step": 0, "pid": 0}


def final(run: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    info = store.open(STEPS)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}


def test_a_process_that_dies_while_the_disk_is_full_is_started_again_when_there_is_room(
    folder: Path, disk: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "prepared", disk / "runs")
    run, said = disk / "runs" / "tiny", tmp_path / "said"
    with said.open("wb") as log, (disk / "out").open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "anychip", *WORDS, "--runs", str(disk / "runs")],
                                   cwd=folder, stdout=out, stderr=log)  # fmt: skip

    def full_until(condition: Callable[[], Any]) -> None:
        wait_for(lambda: (fill(disk), condition())[1], 120)

    try:
        wait_for(lambda: beat(run, 1)["step"] >= 13, 120)
        full_until(lambda: beat(run, 1)["step"] >= 15)
        os.kill(beat(run, 1)["pid"], signal.SIGKILL)
        full_until(lambda: "was killed by SIGKILL" in said.read_text())
        assert "is kept in memory" in said.read_text()
        full_until(lambda: "the disk did not take" in said.read_text() or "no process can be" in said.read_text())
        assert process.poll() is None
        (disk / "filler").unlink()
        assert process.wait(timeout=200) == 0, said.read_text()
    finally:
        process.kill()
        process.wait()
    found = [json.loads(line) for line in (run / "logs" / "incidents.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in found if row["kind"] != "slow"]
    assert kinds[0] == "crash" and set(kinds[1:]) <= {"disk"}
    expected, weights = final(folder / "runs" / "tiny"), final(run)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_lines_wait_in_order_and_none_is_torn_or_twice(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = disk / "logs" / "lines.jsonl"
    lines = Lines(path)
    lines.add({"number": 0})
    with path.open("a") as handle:
        handle.write('{"torn')  # by whoever was killed
    fill(disk)
    for number in range(1, 4):
        lines.add({"number": number, "text": "x" * 3 * PAGE})
    assert capsys.readouterr().err.count("is kept in memory") == 1
    assert path.stat().st_size < PAGE  # nothing of a line that was not taken whole
    (disk / "filler").unlink()
    lines.add({"number": 4})
    rows = path.read_text().splitlines()
    assert rows.pop(1) == '{"torn'
    assert [json.loads(row)["number"] for row in rows] == [0, 1, 2, 3, 4]
    fill(disk)
    for _ in range(100):  # into the last page
        lines.add({"number": 5, "text": "x" * PAGE})
    lines.close()
    assert "is lost" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_in_trouble_when_an_incident_is_noted_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    world, broken = World(monkeypatch, tmp_path, 1, 2), [False]
    a, b = world.agent("a"), world.agent("b")
    log, whole = world.run.logs / "incidents.jsonl", Path.open

    def opened(self: Path, *inputs: Any, **named: Any) -> Any:
        if self == log and broken[0]:
            raise OSError(number, os.strerror(number), str(self))
        return whole(self, *inputs, **named)

    monkeypatch.setattr(Path, "open", opened)

    def script() -> Script:
        yield world.running(a, b, number=1)
        broken[0] = True
        b.die(-9)
        yield world.running(a, b, number=2)
        assert not log.exists()
        broken[0] = False
        a.die(-11)
        yield world.running(a, b, number=3)
        yield lambda: [each.finish() for each in (a, b)]

    world.play(script())
    assert [json.loads(line)["code"] for line in log.read_text().splitlines()] == [-9, -11]


def test_no_generation_is_started_that_coordinator_json_does_not_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, broken = World(monkeypatch, tmp_path, 1, 2), [False]
    a, b = world.agent("a"), world.agent("b")
    write = record.write_json

    def written(path: Path, value: object) -> None:
        if broken[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, value)

    monkeypatch.setattr(record, "write_json", written)

    def script() -> Script:
        yield world.running(a, b, number=1)
        broken[0] = True
        b.die(-9)
        until = world.clock.now + 9
        yield lambda: world.clock.now > until
        assert a.started == b.started == [1]
        broken[0] = False
        yield world.running(a, b, number=2)
        assert json.loads((world.run.root / "coordinator.json").read_text())["generation"] == 2
        broken[0] = True  # nor does the end of a run need the disk
        yield lambda: [each.finish() for each in (a, b)]

    world.play(script())
    assert "no process can be started: " in capsys.readouterr().err


def test_a_host_without_room_to_start_reports_it_and_no_host_is_blamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = World(monkeypatch, tmp_path, 1, 2)
    a, b = world.agent("a"), world.agent("b")

    def script() -> Script:
        for number in range(1, 6):
            yield world.running(a, b, number=number)
            b.die(EXIT_DISK, "disk")
        yield world.running(a, b, number=6)
        yield lambda: [each.finish() for each in (a, b)]

    world.play(script())
    rows = map(json.loads, (world.run.logs / "incidents.jsonl").read_text().splitlines())
    assert {(row["kind"], row["action"]) for row in rows} == {("disk", "restart")}


def test_starts_are_tried_only_so_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits: list[float] = []

    class NoRoom(OneHost):
        def __init__(self) -> None: ...

        def start(self, stop: Stop) -> None:
            waits.append(0.0)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "here")

        def pause(self, seconds: float) -> None:
            waits[-1] += seconds
            clock[0] += seconds

    clock = [0.0]
    monkeypatch.setattr("anychip.supervise.run.time.monotonic", lambda: clock[0])
    with pytest.raises(RunFailed, match="here cannot be written") as failed:
        Supervisor(RunDirectory(tmp_path), NoRoom(), Limits(restarts=3), Stop()).run()
    assert failed.value.exit_code == EXIT_DISK
    assert [round(wait) for wait in waits] == [1, 2, 4, 0]


def test_a_generation_without_room_starts_nothing_and_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    run = RunDirectory(disk / "run")
    (run.logs / "ranks").mkdir(parents=True)
    fill(disk)
    mark = tmp_path / "started"
    place = Place([0, 1], 0, 2, 0, 1, "127.0.0.1", 1, "x")
    with pytest.raises(OSError, match="No space"):
        Generation(1, place, ["/bin/sh", "-c", f"echo > {mark}"], run)
    assert not mark.exists()
    assert not heartbeat_folder(run, 1).exists()


def test_a_generation_whose_log_cannot_be_read_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start, whole = subprocess.Popen, Path.open

    def noted(*inputs: Any, **named: Any) -> subprocess.Popen[bytes]:
        started.append(start(*inputs, **named))
        return started[-1]

    def opened(self: Path, mode: str = "r", *inputs: Any, **named: Any) -> Any:
        if (self.name, mode) == ("rank-00000.log", "rb"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return whole(self, mode, *inputs, **named)

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr(Path, "open", opened)
    place = Place([0, 1], 0, 2, 0, 1, "127.0.0.1", 1, "x")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        Generation(1, place, ["/bin/sleep", "60"], RunDirectory(tmp_path))
    assert all(process.poll() is not None for process in started)


def test_a_process_begins_no_heartbeat_that_its_memory_would_end(disk: Path) -> None:
    """A page that is mapped and has no place on the disk is the end of who writes into it (SIGBUS)."""
    folder = disk / "heartbeats"
    folder.mkdir()
    fill(disk)
    for begin in (lambda: PageWriter(folder / "rank-00000.work"), lambda: Heartbeat(folder, 0)):
        with pytest.raises(OSError, match="No space"):
            begin()
