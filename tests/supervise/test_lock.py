"""One supervisor a run: a second one is refused before it starts anything, unless the first is just on its way out."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many_hosts import free_port
from tiny_run import write_tiny_recipe

from anychip.errors import InputError
from anychip.recipe import Recipe, load_recipe
from anychip.rundir import RunDirectory
from anychip.supervise import lock, many_hosts, one_host
from anychip.supervise.coordinator import Terms
from anychip.supervise.lock import only_supervisor
from anychip.supervise.run import Limits

HOLD = """
import sys, time
from pathlib import Path
from anychip.rundir import RunDirectory
from anychip.supervise.lock import only_supervisor
with only_supervisor(RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(1.0)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.1)
    return RunDirectory(tmp_path / "runs" / "tiny")


def of_one_host(recipe: Recipe, run: RunDirectory, _: Path) -> None:
    one_host.supervise(recipe, run, [], 1, Limits())


def of_many(recipe: Recipe, run: RunDirectory, token: Path) -> None:
    place = many_hosts.Place(("127.0.0.1", free_port()), token, bind="127.0.0.1")
    many_hosts.coordinate(recipe, run, place, Terms(1, 1), Limits())


@pytest.mark.parametrize("supervise", [of_one_host, of_many])
def test_a_second_supervisor_is_refused(run: RunDirectory, tmp_path: Path, supervise: Callable[..., None]) -> None:
    recipe, token = load_recipe(write_tiny_recipe(tmp_path)), tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("a secret of sixteen bytes or more")
    with only_supervisor(run), pytest.raises(InputError) as refusal:
        supervise(recipe, run, token)
    text = str(refusal.value)
    assert text.startswith(f"{run.root / 'supervise.lock'}: another `anychip supervise` holds this run.")
    assert "SIGTERM" in text and refusal.value.exit_code == 2
    assert [path.name for path in run.root.iterdir()] == ["supervise.lock"]


def test_one_that_is_on_its_way_out_is_waited_for(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 60.0)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.root)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    began = time.monotonic()
    with only_supervisor(run):
        assert time.monotonic() - began > 0.3
    holder.communicate()


def test_processes_that_a_supervisor_left_do_not_hold_the_run(run: RunDirectory) -> None:
    with only_supervisor(run):
        child = subprocess.Popen(["/bin/sleep", "60"])
    try:
        with only_supervisor(run):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_full_disk_keeps_no_supervisor_out(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", refuse)
    with only_supervisor(run):
        monkeypatch.undo()
    assert "a second supervisor of this run would not be noticed" in capsys.readouterr().err
