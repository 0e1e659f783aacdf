"""Hosts on loopback addresses: agents to start, to kill, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from anychip.rundir import RunDirectory
from anychip.supervise.processes import heartbeat_folders
from anychip.supervise.watch import process_state
from anychip.train.checkpoint import CheckpointStore

ADDRESSES = {"one": "127.0.0.1", "two": "127.0.0.2", "three": "127.0.0.3", "four": "127.0.0.4"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 150.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


class Job:
    """One run of the recipe in `folder`, whose files are below `runs`. Host `one` is the coordinator's."""

    def __init__(self, folder: Path, runs: Path, nodes: str, settings: Sequence[str], *options: str) -> None:
        self.folder, self.run, self.port = folder, runs / "tiny", free_port()
        self.token = runs / "token"
        self.token.write_text("a secret of sixteen bytes or more")
        self.token.chmod(0o600)
        words = [word for setting in settings for word in ("--set", setting)]
        self.words = ["supervise", "tiny.yaml", "--runs", str(runs), *words, "--nodes", nodes, "--lease", "4"]
        self.words += ["--coordinator", f"127.0.0.1:{self.port}", "--token-file", str(self.token), *options]
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, Path] = {name: runs / f"{name}.log" for name in ADDRESSES}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.agents.values():
            process.kill()
            process.wait()

    def start(self, *names: str) -> None:
        for name in names:
            with self.logs[name].open("ab") as log:
                self.agents[name] = subprocess.Popen(
                    [sys.executable, "-m", "anychip", *self.words, "--bind", ADDRESSES[name], "--node-name", name],
                    cwd=self.folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=log,
                )

    def end(self, name: str, seconds: float = 240.0) -> int:
        return self.agents[name].wait(timeout=seconds)

    def said(self, name: str) -> str:
        return self.logs[name].read_text(errors="replace")

    def coordinator(self) -> int:
        """Its process number."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"--coordinate" in words and f"127.0.0.1:{self.port}".encode() in words:
                return int(path.parent.name)
        return 0

    def hosts(self) -> list[str]:
        """Those of the running generation, in the order of their ranks."""
        record = json.loads((self.run / "coordinator.json").read_text())
        return [share["name"] for share in record["shares"]]

    def generation(self) -> int:
        return len(self.generations())

    def generations(self) -> list[dict[str, int]]:
        """The hosts of each, and their processes."""
        return [row["hosts"] for row in rows(self.run / "logs" / "generations.jsonl")]

    def incidents(self) -> list[dict[str, Any]]:
        return rows(self.run / "logs" / "incidents.jsonl")

    def beat(self, rank: int) -> dict[str, Any]:
        """The newest heartbeat of a rank of the newest generation; a step of 0 while there is none."""
        folders = heartbeat_folders(RunDirectory(self.run))
        try:
            return dict(json.loads((folders[-1] / f"rank-{rank:05d}").read_text()))
        except (IndexError, OSError, ValueError):
            return {"step": 0, "pid": 0}

    def wait_for_step(self, step: int, generation: int = 1, rank: int = 0) -> None:
        """Of a process that lives: a generation is written down before its processes have begun."""

        def is_there() -> bool:
            beat = self.beat(rank)
            return beat["step"] >= step and process_state(beat["pid"]) not in ("", "Z")

        wait_for(lambda: self.generation() >= generation and is_there())

    def kill_rank(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.beat(rank)["pid"], number)

    def steps(self) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in rows(self.run / "logs" / "metrics.jsonl") if "loss" in row]

    def state(self, step: int) -> dict[str, torch.Tensor]:
        return state(self.run, step)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run / "checkpoints")
    info = store.open(step)
    return {name: tensor.clone() for name, tensor in store.read(info, info.tensors)}


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
