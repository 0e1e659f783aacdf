"""The folder in a host's memory that holds a run's copies between checkpoints.

RUN/memory.json names it, on all hosts alike, so that a run directory that was removed or copied elsewhere never finds
the copies of what it was. A run that goes back to a checkpoint on disk takes a new name, so that it never finds the
copies of what it left behind, not even on a host that was away. A folder that no run names any more, and that nobody
uses, is removed by the next run that opens one on its host. What cannot be read proves neither: containers may share
the memory of a host and not their runs, and a disk may fail for a while.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from anychip.errors import EXIT_DISK, AnychipError, InputError
from anychip.files import write_json
from anychip.train.checkpoint.ranks import Ranks
from anychip.train.memory.hosts import Hosts
from anychip.train.memory.stay import alone_in, stay_in

FOLDER_VARIABLE = "ANYCHIP_MEMORY_FOLDER"
_RECORD, _OWNER, _PREFIX = "memory.json", "owner.json", "anychip-copies-"
_NAME_BYTES = 8
_NAME = re.compile(rf"{_PREFIX}[0-9a-f]{{{2 * _NAME_BYTES}}}")


class UnreadableError(AnychipError):
    """The disk does not say which folder is the run's. Another start may find that it does (exit code 5)."""

    exit_code = EXIT_DISK


class MemoryFolder:
    """`path` is the folder of one run on this host, below /dev/shm or what ANYCHIP_MEMORY_FOLDER names.

    Every method is called by all ranks together. Raises InputError everywhere when a host cannot make its folder, and
    UnreadableError when the run may have one and does not say which: a new one in its place would give up the copies.
    """

    def __init__(self, run: Path, hosts: Hosts, ranks: Ranks) -> None:
        """Open the folder that the run names, if every host that has it finds it to be this run's; else a new one."""
        self.root = Path(os.environ.get(FOLDER_VARIABLE, "/dev/shm"))
        self._run, self._hosts, self._ranks = run, hosts, ranks
        self._stay = -1  # of each host's leader
        if hosts.is_leader:
            _remove_abandoned(self.root)
        name, problem = ranks.broadcast(_recorded(run) if ranks.is_coordinator else ("", ""))
        if problem:
            do = "Start again when it can be, or remove it to go on from the newest checkpoint on disk."
            raise UnreadableError(problem, where=run / _RECORD, do=do)
        self.path = self.root / name
        foreign = not name or (os.path.lexists(self.path) and not _is_of(self.path, run))
        if any(ranks.exchange(foreign)):
            self._take_new_name()
        self._make()

    def renew(self) -> None:
        """Leave everything behind: an empty folder of another name."""
        self._remove_here()
        self._take_new_name()
        self._make()

    def remove(self) -> None:
        """The run needs none any more."""
        if self._ranks.is_coordinator:
            (self._run / _RECORD).unlink(missing_ok=True)
        self._remove_here()

    def _remove_here(self) -> None:
        if self._hosts.is_leader:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._stay >= 0:
            os.close(self._stay)
            self._stay = -1

    def _take_new_name(self) -> None:
        name = self._ranks.broadcast(f"{_PREFIX}{secrets.token_hex(_NAME_BYTES)}")
        if self._ranks.is_coordinator:
            write_json(self._run / _RECORD, {"folder": name})
        self.path = self.root / name

    def _make(self) -> None:
        problem = ""
        if self._hosts.is_leader:
            try:
                self._stay = _move_into(self.path, self._run)
            except OSError as error:
                problem = f"cannot hold copies of the state: {error.strerror}."
        problem = next(filter(None, self._ranks.exchange(problem)), "")
        if problem:
            do = f"Name another folder in {FOLDER_VARIABLE}, or set checkpoint.memory_interval=0."
            raise InputError(problem, where=self.root, do=do)


def _move_into(path: Path, run: Path) -> int:
    """Make the folder where it lacks, and stay in it; the descriptor that holds it."""
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # another process was about to remove it, and now has
            stay = stay_in(path)
            break
    if not (path / _OWNER).exists():  # nobody removes a folder without an owner, so that there is no moment for it
        write_json(path / _OWNER, {"run": str(run.resolve())})
    return stay


def _recorded(run: Path) -> tuple[str, str]:
    """The name of the run's folder, "" when there is none; and why it cannot be known, "" when it can."""
    try:
        name = _text(run / _RECORD, "folder")
    except (FileNotFoundError, NotADirectoryError):
        return "", ""
    except OSError as error:
        return "", f"cannot be read ({error.strerror}); it names the copies of the state in memory."
    if not _NAME.fullmatch(name):
        print(f"warning: {run / _RECORD} is damaged: copies in memory are not looked for", file=sys.stderr, flush=True)
        return "", ""
    return name, ""


def _is_of(path: Path, run: Path) -> bool:
    """Whether a folder is a real one, this user's, and names the run as its owner."""
    with suppress(OSError):
        ours = path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
        return ours and _text(path / _OWNER, "run") == str(run.resolve())
    return False


def _remove_abandoned(root: Path) -> None:
    """Remove this user's folders that nobody uses and whose run is gone or has another one."""
    for path in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if _is_abandoned(path):
                with alone_in(path) as alone:
                    if alone:
                        shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    """Whether its run certainly is gone, or names another folder. Raises OSError when that cannot be known."""
    run = _text(path / _OWNER, "run")
    if not run or not _is_of(path, Path(run)):
        return False
    try:
        name = _text(Path(run) / _RECORD, "folder")
    except (FileNotFoundError, NotADirectoryError):
        return True
    return name != path.name and _NAME.fullmatch(name) is not None


def _text(path: Path, key: str) -> str:
    """A text in a small JSON file; "" when that is none, or has no such text. Raises OSError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError):
        return ""
    return value if isinstance(value, str) and "\0" not in value else ""
