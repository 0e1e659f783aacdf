"""The folder in a host's memory that holds a run's copies between checkpoints.

RUN/memory.json names it, on all hosts alike, so that a run directory that was removed or copied elsewhere never finds
the copies of what it was. A run that goes back to a checkpoint on disk takes a new name, so that it never finds the
copies of what it left behind, not even on a host that was away. A folder that no run names any more is removed by the
next run that opens one on its host.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from anychip.errors import InputError
from anychip.files import write_json
from anychip.train.checkpoint.ranks import Ranks
from anychip.train.memory.hosts import Hosts

FOLDER_VARIABLE = "ANYCHIP_MEMORY_FOLDER"
_RECORD, _OWNER, _PREFIX = "memory.json", "owner.json", "anychip-copies-"
_NAME_BYTES = 8
_NAME = re.compile(rf"{_PREFIX}[0-9a-f]{{{2 * _NAME_BYTES}}}")


class MemoryFolder:
    """`path` is the folder of one run on this host, below /dev/shm or what ANYCHIP_MEMORY_FOLDER names.

    Every method is called by all ranks together. Raises InputError everywhere when a host cannot make its folder.
    """

    def __init__(self, run: Path, hosts: Hosts, ranks: Ranks) -> None:
        """Open the folder that the run names, if every host that has it finds it to be this run's; else a new one."""
        self.root = Path(os.environ.get(FOLDER_VARIABLE, "/dev/shm"))
        self._run, self._hosts, self._ranks = run, hosts, ranks
        if hosts.is_leader:
            _remove_abandoned(self.root)
        name = ranks.broadcast(_recorded(run) if ranks.is_coordinator else "")
        self.path = self.root / name
        foreign = not name or (os.path.lexists(self.path) and not _is_of(self.path, run))
        if any(ranks.exchange(foreign)):
            self._take_new_name()
        self._make()

    def renew(self) -> None:
        """Leave everything behind: an empty folder of another name."""
        if self._hosts.is_leader:
            shutil.rmtree(self.path, ignore_errors=True)
        self._take_new_name()
        self._make()

    def remove(self) -> None:
        """The run needs none any more."""
        if self._ranks.is_coordinator:
            (self._run / _RECORD).unlink(missing_ok=True)
        if self._hosts.is_leader:
            shutil.rmtree(self.path, ignore_errors=True)

    def _take_new_name(self) -> None:
        name = self._ranks.broadcast(f"{_PREFIX}{secrets.token_hex(_NAME_BYTES)}")
        if self._ranks.is_coordinator:
            write_json(self._run / _RECORD, {"folder": name})
        self.path = self.root / name

    def _make(self) -> None:
        problem = ""
        if self._hosts.is_leader and not self.path.is_dir():
            try:
                self.path.mkdir(mode=0o700)
                write_json(self.path / _OWNER, {"run": str(self._run.resolve())})
            except OSError as error:
                problem = f"cannot hold copies of the state: {error.strerror}."
        problem = next(filter(None, self._ranks.exchange(problem)), "")
        if problem:
            do = f"Name another folder in {FOLDER_VARIABLE}, or set checkpoint.memory_interval=0."
            raise InputError(problem, where=self.root, do=do)


def _recorded(run: Path) -> str:
    """The name of the run's folder; "" when there is none."""
    name = _text(run / _RECORD, "folder")
    return name if _NAME.fullmatch(name) else ""


def _is_of(path: Path, run: Path) -> bool:
    """Whether a folder is a real one, this user's, and names the run as its owner."""
    with suppress(OSError):
        ours = path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
        return ours and _text(path / _OWNER, "run") == str(run.resolve())
    return False


def _remove_abandoned(root: Path) -> None:
    """Remove this user's folders whose run is gone or has another one."""
    for path in root.glob(f"{_PREFIX}*"):
        run = _text(path / _OWNER, "run")
        if run and _is_of(path, Path(run)) and _recorded(Path(run)) != path.name:
            shutil.rmtree(path, ignore_errors=True)


def _text(path: Path, key: str) -> str:
    """A text in a small JSON file; "" when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return value if isinstance(value, str) and "\0" not in value else ""
