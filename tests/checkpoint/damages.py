"""Every kind of damage that a disk, a copy or a careless hand can do to checkpoints, chosen at random."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

BLOCKS = (1, 8, 64, 512)


def _files(step: Path) -> list[Path]:
    return sorted(path for path in step.iterdir() if path.is_file())


def _shards(step: Path) -> list[Path]:
    return sorted(step.glob("*.safetensors"))


def flip(step: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(step))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def flip_many(step: Path, other: Path, chance: random.Random) -> None:
    for _ in range(chance.randint(2, 20)):
        flip(step, other, chance)


def cut(step: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(step))
    os.truncate(path, chance.randrange(path.stat().st_size))


def lengthen(step: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(step))
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 600)))


def zero(step: Path, other: Path, chance: random.Random) -> None:
    """What a page that was never flushed holds after a power cut."""
    path = chance.choice(_files(step))
    data, size = bytearray(path.read_bytes()), chance.choice(BLOCKS)
    start = chance.randrange(len(data))
    data[start : start + size] = bytes(len(data[start : start + size]))
    path.write_bytes(data)


def exchange_blocks(step: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(step))
    data, size = bytearray(path.read_bytes()), chance.choice(BLOCKS)
    a, b = (chance.randrange(max(len(data) // size, 1)) * size for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    path.write_bytes(data)


def exchange_shards(step: Path, other: Path, chance: random.Random) -> None:
    """The files of two ranks under each other's names; of a step with one file, a repeated block."""
    shards = _shards(step)
    if len(shards) < 2:
        return repeat_a_block(step, other, chance)
    a, b = chance.sample(shards, 2)
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    return None


def repeat_a_block(step: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(step))
    data, size = bytearray(path.read_bytes()), chance.choice(BLOCKS)
    a, b = (chance.randrange(max(len(data) // size, 1)) * size for _ in range(2))
    data[a : a + size] = data[b : b + size]
    path.write_bytes(data)


def take_a_file_of_another_checkpoint(step: Path, other: Path, chance: random.Random) -> None:
    """An older step's, or one of the same step of another run, with another number of ranks or of the same shape."""
    path = chance.choice(_files(step))
    if (other / path.name).exists():
        shutil.copyfile(other / path.name, path)
    else:
        path.unlink()


def take_some_files_of_another_checkpoint(step: Path, other: Path, chance: random.Random) -> None:
    """A copy that was interrupted: some files of one checkpoint over another, never all."""
    names = sorted({path.name for path in _files(other)})
    for name in chance.sample(names, chance.randint(1, len(names) - 1)):
        shutil.copyfile(other / name, step / name)


def mix_a_range(step: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(step))
    source = other / path.name if (other / path.name).exists() else chance.choice(_files(other))
    data, foreign = bytearray(path.read_bytes()), source.read_bytes()
    start = chance.randrange(min(len(data), len(foreign)))
    stop = chance.randrange(start, min(len(data), len(foreign))) + 1
    data[start:stop] = foreign[start:stop]
    path.write_bytes(data)


def lose(step: Path, other: Path, chance: random.Random) -> None:
    chance.choice(_files(step)).unlink()


def rename_another_step(step: Path, other: Path, chance: random.Random) -> None:
    """A whole older checkpoint under this step's name."""
    shutil.rmtree(step)
    shutil.copytree(other, step)


def replace_by_a_link(step: Path, other: Path, chance: random.Random) -> None:
    path = chance.choice(_files(step))
    path.unlink()
    path.symlink_to(other / path.name)


def old_version(step: Path, other: Path, chance: random.Random) -> None:
    """A manifest of a version that there is not."""
    path = step / "manifest.json"
    text = path.read_bytes().replace(b'"version":1', b'"version":%d' % chance.choice((0, 2, 9)))
    path.write_bytes(text)


Damage = Callable[[Path, Path, random.Random], None]
DAMAGES: list[Damage] = [
    flip, flip, flip, flip_many, cut, lengthen, zero, exchange_blocks, exchange_shards, repeat_a_block,
    take_a_file_of_another_checkpoint, take_some_files_of_another_checkpoint, mix_a_range, lose, rename_another_step,
    replace_by_a_link, old_version,
]  # fmt: skip
