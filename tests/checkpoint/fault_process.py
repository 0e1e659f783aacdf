"""Run below disk_shim: saves again and again, struck at one system call after the other, and looks at what is left.

    LD_PRELOAD=disk_shim.so DISK_SHIM_CONTROL=PAGE python fault_process.py SCENARIO FAULT FOLDER [EVERY [FIRST]]

Prints one JSON object: how many calls a save makes, how many were struck, how often the old and the new state is left.
SCENARIO is a name below, FAULT one of FAULTS or `trace`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from disk_shim import CHANGES, FAIL, FLUSHES, FOR_EVER, KILL, WRITES, DiskShim
from tiny_state import litter, newest, same, tiny_state

from anychip.errors import AnychipError
from anychip.train.checkpoint import CheckpointStore

ALTERING = WRITES | FLUSHES | CHANGES
FAULTS: dict[str, dict[str, Any]] = {
    "kill": {"action": KILL},
    "input/output error, once": {"action": FAIL, "error": errno.EIO},
    "input/output errors from there on": {"action": FAIL, "error": errno.EIO, "until": FOR_EVER},
    "disk full from there on": {"action": FAIL, "error": errno.ENOSPC, "until": FOR_EVER, "kinds": ALTERING},
    "quota used up from there on": {"action": FAIL, "error": errno.EDQUOT, "until": FOR_EVER, "kinds": ALTERING},
    "read-only from there on": {"action": FAIL, "error": errno.EROFS, "until": FOR_EVER, "kinds": WRITES | CHANGES},
}
CLAIMED = "X"  # a note in the trace: this step was reported as saved
LAST = {"blocking": 2, "background": 2, "copies": 4, "ranks": 2, "ranks in background": 2}


def blocking(root: Path, said: Callable[[int], None]) -> None:
    CheckpointStore(root, keep=1).save(2, tiny_state(2), {"n": 2})
    said(2)


def background(root: Path, said: Callable[[int], None]) -> None:
    store = CheckpointStore(root)
    store.save_async(2, tiny_state(2), {"n": 2})
    store.wait()
    said(2)


def copies(root: Path, said: Callable[[int], None]) -> None:
    """As copies in memory are made: one after the other in the background, two of them kept."""
    store = CheckpointStore(root, keep=2)
    store.prepare(tiny_state(1))
    for step in (2, 3, 4):
        store.save_async(step, tiny_state(step), {"n": step})
        store.wait()
        said(step)


def by_ranks(root: Path, said: Callable[[int], None], *, in_background: bool) -> None:
    group = dist.new_group(backend="gloo")
    store = CheckpointStore(root, keep=1, group=group if isinstance(group, dist.ProcessGroup) else None)
    if in_background:
        store.save_async(2, tiny_state(2), {"n": 2})
        store.wait()
    else:
        store.save(2, tiny_state(2), {"n": 2})
    said(2)


def one_process(save: Callable[[Path, Callable[[int], None]], None], root: Path, trace: Path | None) -> int:
    def said(step: int) -> None:
        if trace:
            with trace.open("a") as handle:
                handle.write(f"{CLAIMED}\t0\t{step}\t0\t\t\n")

    code = 6
    try:
        save(root, said)
        code = 0
    except AnychipError:
        code = 5
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    return code


def forked(scenario: str, root: Path, trace: Path | None) -> list[int]:
    """Exit codes of the processes of a save: 0 claimed success, 5 an error for the user, 6 another one, -9 killed."""
    size = 2 if scenario.startswith("ranks") else 1
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 7
            try:
                if size == 1:
                    save = {"blocking": blocking, "background": background, "copies": copies}[scenario]
                    code = one_process(save, root, trace)
                else:
                    rendezvous = f"file://{root.parent}/rendezvous-{root.name}"
                    limit = timedelta(seconds=20)
                    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=limit)

                    def save_together(root: Path, said: Callable[[int], None]) -> None:
                        by_ranks(root, said, in_background=scenario == "ranks in background")

                    code = one_process(save_together, root, trace if rank == 0 else None)
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def looked_at(scenario: str, root: Path, codes: list[int], where: str) -> int:
    """The step that is left; it, and every other complete one, is exactly what was saved."""
    last = LAST[scenario]
    step, state = newest(root)
    assert step in range(1, last + 1) and same(state, tiny_state(step)), f"{where}: {step}"
    for complete in CheckpointStore(root).steps():
        CheckpointStore(root).open(complete)  # those being retired are not half there
    assert step == last or 0 not in codes, f"{where}: success was claimed, step {step} is there"
    return step


def strike(scenario: str, fault: str, folder: Path, every: int, first: int) -> dict[str, Any]:
    shim = DiskShim(Path(os.environ["DISK_SHIM_CONTROL"]))
    original = folder / "original"
    CheckpointStore(original).save(1, tiny_state(1), {"n": 1})
    shutil.copytree(original, folder / "dry")
    shim.arm(folder / "dry")
    assert set(forked(scenario, folder / "dry", None)) == {0}
    calls, seen, struck = shim.count, Counter[str](), 0
    for at in range(first, calls + 1, every):
        root = folder / f"fault-{at}"
        shutil.copytree(original, root)
        shim.arm(root, at=at, **FAULTS[fault])
        codes = forked(scenario, root, None)
        struck += bool(shim.struck)
        shim.disarm()
        where = f"{scenario}, {fault}, call {at} of {calls}, exit codes {codes}"
        allowed = {0, 5, 6, -9} if fault == "kill" else {0, 5}  # 6: the other rank was killed
        assert set(codes) <= allowed, where
        assert shim.struck or set(codes) == {0}, where
        seen["new" if looked_at(scenario, root, codes, where) == LAST[scenario] else "old"] += 1
        CheckpointStore(root, keep=1).save(9, tiny_state(9), {})
        assert newest(root)[0] == 9 and not litter(root), where
        shutil.rmtree(root)
    return {"calls": calls, "struck": struck, **seen}


def trace(scenario: str, folder: Path) -> dict[str, Any]:
    """Leave FOLDER/root as it was before, FOLDER/trace with what a save changed there."""
    shim = DiskShim(Path(os.environ["DISK_SHIM_CONTROL"]))
    CheckpointStore(folder / "root").save(1, tiny_state(1), {"n": 1})
    shutil.copytree(folder / "root", folder / "before")
    (folder / "trace").touch()
    shim.arm(folder / "root", trace=folder / "trace")
    assert set(forked(scenario, folder / "root", folder / "trace")) == {0}
    shim.disarm()
    return {"calls": shim.count}


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    scenario, fault, folder, *more = sys.argv[1:]
    every, first = (int(more[0]) if more else 1), (int(more[1]) if len(more) > 1 else 1)
    result = trace(scenario, Path(folder)) if fault == "trace" else strike(scenario, fault, Path(folder), every, first)
    print(json.dumps(result))
