"""Whatever system call of a save fails, or is the last one of the process, the old or the new checkpoint is there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk
from tiny_state import litter, newest, same, tiny_state

from anychip.train.checkpoint import CheckpointError, CheckpointStore

Act = Callable[[FaultyDisk, str], None]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: what flushing does is simulated, and thousands of real flushes take minutes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


def _save_with_fault(root: Path, at: int, act: Act, keep: int) -> int:
    """Save step 2 in a forked process with a fault at call `at`; returns its exit code (0: the fault never came)."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            store = CheckpointStore(root, keep)
            with FaultyDisk(at, act) as disk:
                store.save(2, tiny_state(2), {"n": 2})
            code = 0 if disk.count < at else 4
        except CheckpointError:
            code = 5
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die(disk: FaultyDisk, name: str) -> None:
    os._exit(9)


def _lose_power(disk: FaultyDisk, name: str) -> None:
    disk.lose_power(undo_renames=True)


def _lose_contents(disk: FaultyDisk, name: str) -> None:
    disk.lose_power(undo_renames=False)


def _input_output_error(disk: FaultyDisk, name: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _no_space(disk: FaultyDisk, name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("act", [_die, _lose_power, _lose_contents, _input_output_error, _no_space])
def test_a_fault_at_every_call_leaves_exactly_old_or_exactly_new(folder: Path, act: Act) -> None:
    keep, original = 1, folder / "original"
    kills = act not in (_input_output_error, _no_space)
    CheckpointStore(original).save(1, tiny_state(1), {"n": 1})
    outcomes: list[int] = []
    for at in range(1, 1000):
        root = folder / f"fault-{at}"
        shutil.copytree(original, root)
        code = _save_with_fault(root, at, act, keep)
        step, state = newest(root)
        assert step in (1, 2) and same(state, tiny_state(step)), f"call {at}"
        for complete in CheckpointStore(root).steps():
            CheckpointStore(root).open(complete)  # those being retired are not half there
        if code == 0:
            assert step == 2
            break
        assert code in ((9,) if kills else (4, 5)), f"call {at}: exit code {code}"
        assert code != 4 or step == 2, f"call {at}: success was claimed and the new checkpoint is not there"
        outcomes.append(step)
        CheckpointStore(root, keep).save(3, tiny_state(3), {})
        assert newest(root)[0] == 3 and not litter(root), f"call {at}"
        shutil.rmtree(root)
    assert len(outcomes) > 30 and set(outcomes) == {1, 2}
    assert not kills or outcomes == sorted(outcomes)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("undo_renames", [False, True])
def test_what_a_save_has_claimed_survives_a_power_cut(folder: Path, undo_renames: bool) -> None:
    child = os.fork()
    if child == 0:
        with FaultyDisk(0, _die) as disk:
            CheckpointStore(folder).save(1, tiny_state(1), {})
            disk.lose_power(undo_renames)
    os.waitpid(child, 0)
    step, state = newest(folder)
    assert step == 1 and same(state, tiny_state(1))


def _run_out_of_space(root: Path, setup: str) -> str:
    """Save three times in a process that cannot write the larger states; returns what it said."""
    code = f"""
import sys, torch
from pathlib import Path
from anychip.errors import AnychipError
from anychip.train.checkpoint import CheckpointStore
{setup}
store, small, large = CheckpointStore(Path(sys.argv[1])), torch.arange(1000), torch.zeros(3_000_000)
store.save(1, {{"x": small}}, {{}})
try:
    store.save(2, {{"x": large}}, {{}})
except AnychipError as error:
    print("blocking", error)
store.save_async(3, {{"x": large}}, {{}})
try:
    store.wait()
except AnychipError as error:
    print("background", error)
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
store.save(4, {{"x": small}}, {{}})
print(store.steps())
"""
    run = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_file_size_limit_is_an_error_message_and_training_goes_on(tmp_path: Path) -> None:
    setup = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, resource.RLIM_INFINITY))"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    said = _run_out_of_space(tmp_path, setup)
    assert (
        said.count("File too large") == 2 and "step-000002" in said and "['step-000001']" in said and "[1, 4]" in said
    )
    assert not litter(tmp_path)


def test_full_disk_is_an_error_message_and_training_goes_on(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        said = _run_out_of_space(tmp_path, "")
        assert said.count("No space left on device") == 2 and "['step-000001']" in said and "[1, 4]" in said
        assert not litter(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
