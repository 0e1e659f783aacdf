"""A folder of copies is removed when nobody needs it, and never because a disk fails or a run cannot be seen."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anychip.errors import EXIT_DISK
from anychip.train.checkpoint.ranks import Ranks
from anychip.train.memory.folder import FOLDER_VARIABLE, MemoryFolder, UnreadableError
from anychip.train.memory.hosts import Hosts


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "memory"))


def opened(run: Path) -> MemoryFolder:
    run.mkdir(exist_ok=True)
    return MemoryFolder(run, Hosts((0,), 0), Ranks(None))


_USE = """
import subprocess, sys, time
from pathlib import Path
from test_memory_folder import opened
folder = opened(Path(sys.argv[1]))
if sys.argv[2] == "renewed":
    folder.renew()
(folder.path / "precious").touch()
child = subprocess.Popen(["sleep", "60"], close_fds=False).pid
print(folder.path, child, flush=True)
time.sleep(60)
"""


@contextmanager
def used_by_a_process(run: Path, how: str = "opened") -> Iterator[Path]:
    """The folder of a run, until the process that uses it is killed; its child lives on to the end of the test."""
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))
    environment = {**os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen(
        [sys.executable, "-c", _USE, run, how], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    path, child = process.stdout.readline().split()
    try:
        yield Path(path)
        process.kill()
        process.wait()
        opened(run.with_name("one more"))
        assert not Path(path).exists(), "a child holds what only its parent used"
    finally:
        process.kill()
        os.kill(int(child), 9)


def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path, error: int) -> None:
    real = Path.read_text

    def read_text(self: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if self == path:
            raise OSError(error, os.strerror(error), str(path))
        return real(self, encoding, errors)

    monkeypatch.setattr(Path, "read_text", read_text)


def left_by_a_killed_process(run: Path) -> Path:
    """A folder that nobody uses."""
    folder = opened(run)
    os.close(folder._stay)
    return folder.path


@pytest.mark.parametrize("how", ["opened", "renewed"])
def test_a_folder_in_use_stays_though_its_run_cannot_be_seen(tmp_path: Path, how: str) -> None:
    with used_by_a_process(tmp_path / "run", how) as path:
        (tmp_path / "run").rename(tmp_path / "elsewhere")  # as another container would not see it
        opened(tmp_path / "other")
        assert (path / "precious").exists()


def test_one_that_nobody_uses_goes_with_its_run(tmp_path: Path) -> None:
    gone, replaced, named = (left_by_a_killed_process(tmp_path / name) for name in ("gone", "replaced", "named"))
    shutil.rmtree(tmp_path / "gone")
    shutil.rmtree(tmp_path / "replaced")
    (tmp_path / "replaced").touch()
    opened(tmp_path / "other")
    assert [path.exists() for path in (gone, replaced, named)] == [False, False, True]
    (tmp_path / "named" / "memory.json").write_text('{"folder": "anychip-copies-0123456789abcdef"}')
    opened(tmp_path / "other")
    assert not named.exists()


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
def test_a_failing_disk_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    path = left_by_a_killed_process(tmp_path / "run")
    record = tmp_path / "run" / "memory.json"
    with monkeypatch.context() as failing:
        unreadable(failing, record, error)
        opened(tmp_path / "other")
        with pytest.raises(UnreadableError, match="it names the copies") as raised:
            opened(tmp_path / "run")
        assert raised.value.exit_code == EXIT_DISK
    assert path.exists() and opened(tmp_path / "run").path == path


def test_a_damaged_record_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = left_by_a_killed_process(tmp_path / "run")
    (tmp_path / "run" / "memory.json").write_text('{"folder": "anych')
    opened(tmp_path / "other")
    assert path.exists()
    assert opened(tmp_path / "run").path != path
    assert "memory.json is damaged" in capfd.readouterr().err


def test_a_start_waits_for_who_removes_its_folder_and_makes_it_anew(tmp_path: Path) -> None:
    path = left_by_a_killed_process(tmp_path / "run")
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def remove() -> None:
        time.sleep(0.3)
        shutil.rmtree(path)
        os.close(descriptor)

    remover = threading.Thread(target=remove)
    remover.start()
    folder = opened(tmp_path / "run")
    remover.join()
    assert folder.path == path and (path / "owner.json").exists()


def test_what_was_given_back_is_held_no_longer(tmp_path: Path) -> None:
    before = open_files()
    folder = opened(tmp_path / "run")
    folder.renew()
    assert open_files() == before + 1
    folder.remove()
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
