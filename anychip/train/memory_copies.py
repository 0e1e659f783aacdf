"""The folder in the host's memory that holds a run's copies between checkpoints.

RUN/memory.json names it, so that a run directory that was removed or copied elsewhere never finds the copies of what it
was; a folder that no run names any more is removed by the next run that opens one.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

from anychip.errors import InputError
from anychip.files import write_json
from anychip.parallel.processes import Processes

FOLDER_VARIABLE = "ANYCHIP_MEMORY_FOLDER"
_RECORD, _OWNER, _PREFIX = "memory.json", "owner.json", "anychip-copies-"
_NAME_BYTES = 8


class MemoryFolder:
    """`path` is the folder of one run, below /dev/shm or what ANYCHIP_MEMORY_FOLDER names."""

    def __init__(self, path: Path, record: Path) -> None:
        self.path, self._record = path, record

    @classmethod
    def open(cls, run: Path, processes: Processes) -> MemoryFolder:
        """The run's folder, made when there is none; the same on all processes.

        Raises InputError when processes of this job are on other hosts, whose memory this one cannot see.
        """
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes.layout.world_size)))
        if local != processes.layout.world_size:
            raise InputError(
                f"checkpoint.memory_interval works on one host, and {local} of {processes.layout.world_size} processes "
                "are on this one.",
                do="Set checkpoint.memory_interval=0.",
            )
        root, record = Path(os.environ.get(FOLDER_VARIABLE, "/dev/shm")), run / _RECORD
        if processes.is_first:
            _remove_abandoned(root)
            if _recorded(record, root) is None:
                _make(record, root)
        processes.barrier()
        path = _recorded(record, root)
        if path is None:
            raise InputError("does not name a folder of copies.", where=record, do="Remove it and start again.")
        return cls(path, record)

    def remove(self) -> None:
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def _make(record: Path, root: Path) -> None:
    path = root / f"{_PREFIX}{secrets.token_hex(_NAME_BYTES)}"
    path.mkdir(mode=0o700)
    write_json(path / _OWNER, {"run": str(record.parent.resolve())})
    write_json(record, {"path": str(path)})


def _recorded(record: Path, root: Path) -> Path | None:
    """The folder that a record names, if it is one of ours and names this run in turn."""
    path = Path(_text(record, "path"))
    ours = path.parent == root and path.name.startswith(_PREFIX) and path.is_dir() and not path.is_symlink()
    return path if ours and _text(path / _OWNER, "run") == str(record.parent.resolve()) else None


def _remove_abandoned(root: Path) -> None:
    """Remove this user's folders whose run is gone or has another one."""
    for path in root.glob(f"{_PREFIX}*"):
        if path.is_symlink() or not path.is_dir() or path.stat().st_uid != os.getuid():
            continue
        run = _text(path / _OWNER, "run")
        if run and _recorded(Path(run) / _RECORD, root) != path:
            shutil.rmtree(path, ignore_errors=True)


def _text(path: Path, key: str) -> str:
    """A text in a small JSON file; "" when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return value if isinstance(value, str) and "\0" not in value else ""
