"""A row of the log that a full disk does not take is written when there is room, though no further row is due, and
before a state is saved that a kill would leave without it."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_copies import job_in

from anychip.data.cursor import DataCursor
from anychip.recipe.schema import CheckpointConfig, LogConfig
from anychip.train.loop import run_training
from anychip.train.metrics import MetricsLog
from anychip.train.observe import Observer
from anychip.train.saves import Saves


class FullDisk(Observer):
    """The log's disk is full in step 4. `logged` are the steps that the log holds when each step begins, `outlived`
    those when each step is saved, which a kill just after would leave."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._step = path, 0
        self.logged: dict[int, list[int]] = {}
        self.outlived: dict[int, list[int]] = {}
        real, real_save = MetricsLog._append, Saves.save

        def append(log: MetricsLog) -> None:
            if self._step == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(log)

        def save(saves: Saves, step: int, cursor: DataCursor, *, last: bool) -> None:
            self.outlived[step] = self._rows()
            real_save(saves, step, cursor, last=last)

        monkeypatch.setattr(MetricsLog, "_append", append)
        monkeypatch.setattr(Saves, "save", save)

    def begin(self, step: int, lr: float) -> None:
        self._step = step
        self.logged[step] = self._rows()

    def _rows(self) -> list[int]:
        return [json.loads(line)["step"] for line in self._path.read_text().splitlines()]


def test_they_are_written_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(tmp_path / "logs" / "metrics.jsonl", monkeypatch)
    job = replace(job_in(tmp_path, {}), log=LogConfig(interval=4, tensorboard=False), observer=disk)
    run_training(job)
    assert [disk.logged[step] for step in (4, 5, 6, 8)] == [[1], [1], [1, 4], [1, 4]]


def test_they_are_written_before_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(tmp_path / "logs" / "metrics.jsonl", monkeypatch)
    every_step = CheckpointConfig(save_interval=1, keep=1, asynchronous=False)
    log = LogConfig(interval=4, tensorboard=False)
    run_training(replace(job_in(tmp_path, {}), log=log, checkpoint=every_step, observer=disk))
    assert [disk.outlived[step] for step in (3, 4, 5, 8)] == [[1], [1], [1, 4], [1, 4, 8]]
