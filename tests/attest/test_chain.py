"""Wherever a process dies, the chain is whole at the next start, or says what happened."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from anychip.attest import chain as chain_module
from anychip.attest.chain import Chain, read_links
from anychip.attest.check.history import read_history
from anychip.errors import AnychipError, InputError, UnfitError
from anychip.train.fence import Fence, Fenced


def write(path: Path, count: int = 3) -> bytes:
    with Chain(path) as chain:
        for number in range(count):
            chain.append("stage", {"stage": f"{number}", "record": "0" * 64})
    return path.read_bytes()


def problems(path: Path) -> list[str]:
    return [problem.reason for problem in read_history(path.read_bytes(), {}).findings.problems]


def test_a_chain_of_links_holds(tmp_path: Path) -> None:
    write(tmp_path / "chain.jsonl")
    assert problems(tmp_path / "chain.jsonl") == []
    assert [link.body["stage"] for link in read_links(tmp_path / "chain.jsonl")] == ["0", "1", "2"]


def test_a_process_that_dies_at_any_byte_leaves_a_chain_that_goes_on(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jsonl")
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, ends[0] - 1, *range(ends[1] - 1, len(whole) + 1)):
        path = tmp_path / "chain.jsonl"
        path.write_bytes(whole[:cut])
        with Chain(path) as chain:
            kinds = [link.kind for link in chain.links]
            chain.append("stage", {"stage": "later", "record": "0" * 64})
        left = sum(end <= cut for end in ends)
        torn = cut not in (0, *ends)
        assert kinds == ["stage"] * left + ["repair"] * torn
        assert problems(path) == []


def test_a_line_that_was_changed_ends_the_run_at_its_next_start(tmp_path: Path) -> None:
    path = tmp_path / "chain.jsonl"
    whole = write(path)
    path.write_bytes(whole.replace(b'"stage":"1"', b'"stage":"7"'))
    with pytest.raises(UnfitError, match="link 2 does not follow"):
        Chain(path)
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(UnfitError, match="link 1 does not follow"):
        Chain(path)


def test_two_processes_do_not_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "_LOCK_SECONDS", 0.2)
    with Chain(tmp_path / "chain.jsonl"), pytest.raises(InputError, match="another process writes this chain"):
        Chain(tmp_path / "chain.jsonl")
    write(tmp_path / "chain.jsonl")


def test_a_full_disk_costs_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Half a line is taken, then nothing, then there is room again."""
    path, real, room = tmp_path / "chain.jsonl", os.write, [10**6]

    def limited(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = data[: room[0]]
        room[0] -= len(taken)
        return real(descriptor, taken)

    monkeypatch.setattr(chain_module.os, "write", limited)
    with Chain(path) as chain:
        chain.append("stage", {"stage": "0", "record": "0" * 64})
        room[0] = 20
        chain.append("stage", {"stage": "1", "record": "0" * 64})
        chain.append("stage", {"stage": "2", "record": "0" * 64})
        assert "training goes on, its links are kept" in capsys.readouterr().err
        room[0] = 10**6
        chain.append("stage", {"stage": "3", "record": "0" * 64})
    assert problems(path) == []
    assert [link.body["stage"] for link in read_links(path)] == ["0", "1", "2", "3"]


def test_a_generation_that_was_given_up_links_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "coordinator.json"
    record.write_text('{"generation": 2}', encoding="utf-8")
    with Chain(tmp_path / "chain.jsonl") as chain:
        monkeypatch.setattr(chain_module, "fence", lambda: Fence(generation=1, record=record))
        with pytest.raises(Fenced):
            chain.append("stage", {"stage": "0", "record": "0" * 64})
    assert (tmp_path / "chain.jsonl").read_bytes() == b""
    assert issubclass(Fenced, AnychipError)
