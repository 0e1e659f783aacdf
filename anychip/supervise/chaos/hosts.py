"""The hosts of a run under faults: one supervisor, or an agent on each of several addresses, started as a service
manager would and started again when a fault ended them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anychip.supervise.chaos.history import FOLDER_VARIABLE as HISTORY_VARIABLE
from anychip.supervise.chaos.networks import COORDINATOR_PORT, Networks
from anychip.train.memory.folder import FOLDER_VARIABLE

LEASE_SECONDS = 4.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Host:
    """How one is started. `memory` is where its processes keep their copies; None: where every run does."""

    words: tuple[str, ...]
    memory: Path | None = None


def one_host(words: Sequence[str], processes: int) -> list[Host]:
    """`words` are the arguments of `anychip supervise` that say what to train."""
    return [Host((sys.executable, "-m", "anychip", *words, "--processes", str(processes)))]


def many_hosts(words: Sequence[str], processes: int, hosts: int, folder: Path, networks: Networks | None) -> list[Host]:
    """Hosts that share `processes` evenly, on loopback addresses, or each in a network of its own. `folder` takes the
    job's secret and the hosts' memory."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    addresses = networks.addresses if networks else [f"127.0.0.{number + 1}" for number in range(hosts)]
    port = COORDINATOR_PORT if networks else _free_port(addresses[0])
    options = ["--nodes", str(hosts), "--coordinator", f"{addresses[0]}:{port}", "--token-file", str(token)]
    options += ["--processes", str(processes // hosts), "--lease", str(LEASE_SECONDS)]
    found = []
    for number, address in enumerate(addresses):
        place = [*networks.enter(number)] if networks else []
        where = ["--interface", networks.interface] if networks else ["--bind", address]
        command = [*place, sys.executable, "-m", "anychip", *words, *options, *where, "--node-name", f"host-{number}"]
        found.append(Host(tuple(command), folder / "memory" / f"host-{number}"))
    return found


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class RunningHosts:
    """Hosts by number, each with its log; all are killed when the block ends. Their processes take part in the history
    in this folder."""

    def __init__(self, hosts: Sequence[Host], logs: Path, history: Path) -> None:
        self._hosts, self._history = hosts, history
        self._logs = [logs / f"supervisor-{number}.log" for number in range(len(hosts))]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> RunningHosts:
        for number in range(len(self._hosts)):
            self.start(number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._processes:
            self.kill(number)

    def __len__(self) -> int:
        return len(self._hosts)

    def start(self, number: int) -> None:
        host, environment = self._hosts[number], {**os.environ, HISTORY_VARIABLE: str(self._history)}
        if host.memory is not None:
            host.memory.mkdir(parents=True, exist_ok=True)
            environment[FOLDER_VARIABLE] = str(host.memory)
        with self._logs[number].open("ab") as log:
            self._processes[number] = subprocess.Popen(
                host.words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )

    def kill(self, number: int) -> None:
        self._processes[number].kill()
        self._processes[number].wait()

    def forget_memory(self, number: int) -> None:
        if (memory := self._hosts[number].memory) is not None:
            shutil.rmtree(memory, ignore_errors=True)

    def terminate(self, number: int) -> None:
        self._processes[number].terminate()

    def any_ended(self) -> bool:
        return any(process.poll() is not None for process in self._processes.values())

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes once all have ended; None for those that have not after so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes.values()):
            time.sleep(_POLL_SECONDS)
        return [self._processes[number].poll() for number in range(len(self._hosts))]

    def coordinator(self) -> int:
        """The number of the process that coordinates; 0 while there is none."""
        parents = {process.pid for process in self._processes.values()}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in parents and b"--coordinate" in (path / "cmdline").read_bytes().split(b"\0"):
                    return int(path.name)
            except OSError:  # it ended in this moment
                continue
        return 0

    def kill_coordinator(self) -> None:
        if pid := self.coordinator():
            os.kill(pid, signal.SIGKILL)

    def last_words(self) -> str:
        return "\n".join(log.read_text(errors="replace").strip()[-400:] for log in self._logs)
