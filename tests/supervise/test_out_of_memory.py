"""A process that ran out of memory is told from one that was killed, and not started again for ever."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from many_hosts import wait_for
from tiny_run import finish, start, write_tiny_recipe

from anychip.supervise.decide import Policy, kind_of_exit
from anychip.supervise.out_of_memory import MemoryKills, kills, own_events
from anychip.train.checkpoint import CheckpointStore


def test_the_control_group_counts_kills(tmp_path: Path) -> None:
    events, log = tmp_path / "memory.events", tmp_path / "kmsg"
    events.write_text("low 0\nhigh 0\nmax 7\noom 2\noom_kill 2\noom_group_kill 0\n")
    memory = MemoryKills(events, log)
    assert not memory.ran_out(10, -9, [])
    events.write_text("oom 3\noom_kill 3\n")
    assert memory.ran_out(10, -9, [])
    assert not MemoryKills(events, log).ran_out(10, -9, [])  # that kill was before


def test_the_kernel_names_whom_it_killed(tmp_path: Path) -> None:
    log = tmp_path / "kmsg"
    log.write_text("3,1,2,-;Out of memory: Killed process 1234 (python) total-vm:9kB\n")
    memory = MemoryKills(tmp_path / "none", log)
    assert memory.ran_out(1234, -9, [])
    assert not memory.ran_out(123, -9, [])


@pytest.mark.parametrize(
    "line",
    [
        "MemoryError",
        "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 8 GiB: Cannot allocate memory",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: ...",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "  what():  std::bad_alloc",
    ],
)
def test_a_process_says_that_it_ran_out(tmp_path: Path, line: str) -> None:
    memory = MemoryKills(tmp_path / "none", tmp_path / "none")
    assert memory.ran_out(1, 1, ["Traceback", line])
    assert not memory.ran_out(1, 1, ["ValueError: no memory of that"])


def test_files_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("oom_kill many\n")
    assert kills(tmp_path / "events") == kills(tmp_path / "none") == kills(None) == 0
    assert own_events(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("groups", "mounts", "file"),
    [
        ("0::/job", "/ {} rw - cgroup2 cgroup rw", "job/memory.events"),
        (
            "9:cpu:/x\n4:hugetlb,memory:/job\n0::/",
            "/ {} rw - cgroup cgroup rw,hugetlb,memory",
            "job/memory.oom_control",
        ),
        ("4:memory:/pod/one/job", "/pod/one {} rw - cgroup cgroup rw,memory", "job/memory.oom_control"),
        ("4:memory:/pod/one", "/pod/one {} rw - cgroup cgroup rw,memory", "memory.oom_control"),
        ("4:memory:/elsewhere", "/pod/one {} rw - cgroup cgroup rw,memory", "memory.oom_control"),
        ("0::/", "/ {} rw - cgroup2 cgroup rw", "memory.events"),
    ],
)
def test_the_counter_of_the_own_group_is_found(tmp_path: Path, groups: str, mounts: str, file: str) -> None:
    process, mounted = tmp_path / "process", tmp_path / "mounted"
    (mounted / "job").mkdir(parents=True)
    (mounted / file).write_text("oom_kill 3\n")
    process.mkdir()
    (process / "cgroup").write_text(f"{groups}\n")
    others = "31 23 0:28 / /x rw - tmpfs tmpfs rw,mode=755\n32 31 0:29 / /y rw - cgroup cgroup rw,cpu\n"
    (process / "mountinfo").write_text(f"{others}33 31 0:30 {mounts.format(mounted)}\n")
    assert own_events(process) == mounted / file
    assert kills(own_events(process)) == 3
    for without in (others, "a line of another form\n"):
        (process / "mountinfo").write_text(without)
        assert own_events(process) is None


def test_a_kill_at_a_real_limit_is_counted(tmp_path: Path) -> None:
    """By the counter alone, with the kernel's log out of sight."""
    groups = Path("/sys/fs/cgroup/memory")
    if not (groups / "memory.oom_control").exists() or not os.access(groups, os.W_OK):
        pytest.skip("needs control groups of version 1 that may be made here")
    group = groups / f"anychip-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
        process = subprocess.Popen(
            [sys.executable, "-c", "input(); bytearray(256 << 20)"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        (group / "cgroup.procs").write_text(str(process.pid))
        memory = MemoryKills(own_events(Path("/proc", str(process.pid))), tmp_path / "none")
        assert not memory.ran_out(process.pid, -9, [])
        process.communicate(b"\n", timeout=60)
        assert process.returncode == -9
        assert memory.ran_out(process.pid, -9, [])
    finally:
        group.rmdir()


def test_an_end_without_memory_has_a_kind_of_its_own() -> None:
    assert [kind_of_exit(code, out_of_memory=True) for code in (-9, -6, 1, -11, 2)] == [
        "oom",
        "oom",
        "oom",
        "crash",
        "bad_input",
    ]


def test_it_is_not_tried_for_ever() -> None:
    decide = Policy(20)
    assert [decide.after("oom", "0", 7, 0.0), decide.after("oom", "0", 7, 1.0)] == ["restart", "stop"]
    assert decide.after("oom", "0", 9, 2.0) == "restart"  # it came further


@pytest.mark.timeout(600)
def test_a_real_one_is_named_explained_and_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes again at every start, with twenty restarts allowed."""
    hooks = Path(__file__).with_name("injuries")
    monkeypatch.setenv("PYTHONPATH", f"{hooks}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("INJURIES", str(tmp_path))
    write_tiny_recipe(tmp_path, steps=2000, eval_interval=0)
    finish(tmp_path, "data", "prepare", "tiny.yaml")
    run = tmp_path / "runs" / "tiny"
    store = CheckpointStore(run / "checkpoints")
    process = start(
        tmp_path, "supervise", "tiny.yaml", "--processes", "2", "--restarts", "20", "--set", "checkpoint.keep=3"
    )
    wait_for(store.steps)
    (tmp_path / "rank-1").write_text("memory")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    rows = [json.loads(line) for line in (run / "logs" / "incidents.jsonl").read_text().splitlines()]
    found = [(row["rank"], row["action"]) for row in rows if row["kind"] == "oom"]  # a busy machine sees hangs too
    assert found[-1] == (1, "stop") and {rank for rank, _ in found} == {1}
    assert len(found) <= 3
    newest = store.latest()
    assert newest is not None
    assert newest.step == max(store.steps())
    assert len(dict(store.read(newest))) == len(newest.tensors)  # reads and compares every byte
    text = finish(tmp_path, "explain", str(run))
    assert "rank 1" in text and "ran out of memory" in text and "training.micro_batch_size" in text
    shutil.rmtree(run)
