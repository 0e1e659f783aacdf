"""What the coordinator keeps in the run directory, so that one that is started again goes on: RUN/coordinator.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from anychip.errors import InputError
from anychip.files import write_json
from anychip.rundir import RunDirectory
from anychip.supervise.lines import Lines
from anychip.supervise.members import Share
from anychip.train.output import where_there_is_room

_NAME = "coordinator.json"
GENERATIONS_LOG = "generations.jsonl"


class Record:
    """The number of the newest generation, its hosts while it runs, and who is in quarantine, why.

    `generation` never goes back: processes compare it with their own before they publish a checkpoint.
    """

    def __init__(self, run: RunDirectory) -> None:
        """Raises InputError when the file makes no sense, OSError when it cannot be read."""
        self._path, self._log = run.root / _NAME, Lines(run.logs / GENERATIONS_LOG)
        self.generation, self.shares, self.quarantined = 0, tuple[Share, ...](), dict[str, str]()
        if not self._path.is_file():
            return
        try:
            row: dict[str, Any] = json.loads(self._path.read_bytes())
            self.generation = int(row["generation"])
            self.shares = tuple(Share(**share) for share in row["shares"])
            self.quarantined = {str(name): str(why) for name, why in row["quarantined"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            do = "Remove it when no process of this run is alive anywhere."
            raise InputError(f"makes no sense ({error}).", where=self._path, do=do) from None

    def begin(self, number: int, shares: list[Share]) -> None:
        """A new generation, before any of its processes is started. Raises OSError when this cannot be written, and
        then none may be: the number is what keeps older ones from publishing."""
        assert number > self.generation
        self._write(number, shares)
        self.generation, self.shares = number, tuple(shares)
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._log.add({"generation": number, "time": time, "hosts": {share.name: share.slots for share in shares}})

    def ended(self) -> None:
        """None of the newest generation's processes is alive. Where the disk does not take it nothing is lost: who
        reads the file asks the hosts, and finds that they run nothing."""
        self.shares = ()
        self.write()

    def close(self) -> None:
        self._log.close()

    def write(self) -> None:
        """What `begin` would write as well: on a full disk it can wait until then."""
        with where_there_is_room(self._path.name):
            self._write(self.generation, self.shares)

    def _write(self, generation: int, shares: Sequence[Share]) -> None:
        """Raises OSError."""
        rows = [asdict(share) for share in shares]
        write_json(self._path, {"generation": generation, "shares": rows, "quarantined": dict(self.quarantined)})


def quarantined(run: RunDirectory) -> dict[str, str]:
    """Hosts that were left out, and why; none where the record makes no sense."""
    try:
        return Record(run).quarantined
    except (InputError, OSError):
        return {}


def fence_of(run: RunDirectory, generation: int) -> str:
    """What processes of this generation compare themselves with (see anychip/train/fence.py)."""
    return f"{generation}:{(run.root / _NAME).resolve()}"
