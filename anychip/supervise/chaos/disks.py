"""Damage to what lies on a disk, and a disk without room."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from anychip.rundir import RunDirectory
from anychip.train.checkpoint.directory import complete_steps, step_name

_FULL_BYTES = 4096
_BLOCK_BYTES = 128 << 10  # a bit in each is enough to meet one soon


def damage_newest(run: RunDirectory, change: Callable[[bytearray], None], tell: Callable[[int], None]) -> None:
    """Change a file of the newest checkpoint, if an older one is there to fall back on; `tell` its step first."""
    steps = complete_steps(run.checkpoints)
    if len(steps) < 2:
        return
    for path in sorted((run.checkpoints / step_name(steps[-1])).glob("*.safetensors"))[:1]:
        data = bytearray(path.read_bytes())
        change(data)
        tell(steps[-1])
        path.write_bytes(data)


@contextmanager
def damaged_tokens(run: RunDirectory, bit: int) -> Iterator[list[str]]:
    """A bit turned over in every block of the tokens that training reads; the names of the files. What processes have
    open stays as it was."""
    paths = sorted((run.data / "train").glob("*.bin"))
    kept = {path: path.with_suffix(".kept") for path in paths}
    try:
        for path, good in kept.items():
            good.hardlink_to(path)
            data = bytearray(good.read_bytes())
            for start in range(0, len(data), _BLOCK_BYTES):
                data[start + bit // 8 % min(_BLOCK_BYTES, len(data) - start)] ^= 1 << bit % 8
            (damaged := path.with_suffix(".damaged")).write_bytes(data)
            damaged.replace(path)
        yield [path.name for path in paths]
    finally:
        for path, good in kept.items():
            good.replace(path)


@contextmanager
def no_room(pids: Sequence[int]) -> Iterator[None]:
    """As if the disk were full, for these processes: the kernel refuses to let their files grow (EFBIG)."""
    limits = {}
    for pid in pids:
        try:
            soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FULL_BYTES, hard))
            limits[pid] = soft, hard
        except ProcessLookupError:
            continue
    try:
        yield
    finally:
        for pid, limit in limits.items():
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
            except ProcessLookupError:
                continue
