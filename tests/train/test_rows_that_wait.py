"""A row of the log that a full disk does not take is written when there is room, though no further row is due."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_copies import job_in

from anychip.recipe.schema import LogConfig
from anychip.train.loop import run_training
from anychip.train.metrics import MetricsLog
from anychip.train.observe import Observer


class FullDisk(Observer):
    """The log's disk is full in step 4; `logged` are the steps that the log holds when each step begins."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._step = path, 0
        self.logged: dict[int, list[int]] = {}
        real = MetricsLog._append

        def append(log: MetricsLog) -> None:
            if self._step == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(log)

        monkeypatch.setattr(MetricsLog, "_append", append)

    def begin(self, step: int, lr: float) -> None:
        self._step = step
        self.logged[step] = [json.loads(line)["step"] for line in self._path.read_text().splitlines()]


def test_they_are_written_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(tmp_path / "logs" / "metrics.jsonl", monkeypatch)
    job = replace(job_in(tmp_path, {}), log=LogConfig(interval=4, tensorboard=False), observer=disk)
    run_training(job)
    assert [disk.logged[step] for step in (4, 5, 6, 8)] == [[1], [1], [1, 4], [1, 4]]
