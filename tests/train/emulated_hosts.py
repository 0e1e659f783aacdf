"""Hosts that are folders: spawned ranks that are told which host they are on and where its memory is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rank_pool import run_ranks


def memory_of(folder: Path, host: int) -> Path:
    """The memory of a host; lost with it when the test removes the folder."""
    path = folder / f"memory-of-host-{host}"
    path.mkdir(exist_ok=True)
    return path


def run_hosts(
    layout: list[int], work: Callable[[Any], None], argument: Any, folder: Path, timeout: float = 240.0
) -> None:
    """`work(argument)` in as many processes as `layout` says for each host, in the order of ranks."""
    hosts = [(host, processes, str(memory_of(folder, host))) for host, processes in enumerate(layout)]
    run_ranks(sum(layout), _on_host, (hosts, work, argument), folder, timeout)


def _on_host(argument: tuple[list[tuple[int, int, str]], Callable[[Any], None], Any]) -> None:
    hosts, work, rest = argument
    host, processes, memory = [one for one in hosts for _ in range(one[1])][int(os.environ["RANK"])]
    os.environ.update(GROUP_RANK=str(host), LOCAL_WORLD_SIZE=str(processes), ANYCHIP_MEMORY_FOLDER=memory)
    work(rest)
