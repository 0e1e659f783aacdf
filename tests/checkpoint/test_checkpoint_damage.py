"""No changed byte passes: flips, cuts, swaps and losses are found, named, and the checkpoint before is used."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from tiny_state import newest, same, tiny_state

from anychip.errors import AnychipError, UnfitError
from anychip.train.checkpoint import CheckpointStore

FLIPS = 300


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, tiny_state(1), {"n": 1})
    store.save(2, tiny_state(2), {"n": 2})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("name", ["rank-0000.safetensors", "manifest.json", "COMPLETE"])
def test_every_flipped_bit_is_found(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "step-000002" / name
    good = path.read_bytes()
    chooser = random.Random(name)
    for _ in range(FLIPS):
        position, bit = chooser.randrange(len(good)), chooser.randrange(8)
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
        info = CheckpointStore(root).latest()
        assert info and info.step == 1, f"bit {bit} of byte {position}"
        assert str(path.parent) in capsys.readouterr().err
    path.write_bytes(good)
    assert newest(root)[0] == 2


@pytest.mark.parametrize("name", ["rank-0000.safetensors", "manifest.json", "COMPLETE"])
def test_every_truncation_and_any_addition_is_found(root: Path, name: str) -> None:
    path = root / "step-000002" / name
    good = path.read_bytes()
    for length in {*range(0, len(good), 7), len(good) - 1}:
        path.write_bytes(good[:length])
        assert newest(root)[0] == 1, length
    path.write_bytes(good + b"\n")
    assert newest(root)[0] == 1
    path.write_bytes(good)
    assert newest(root)[0] == 2


def test_loss_swap_and_links_are_found_and_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (root / f"step-00000{n}" / "rank-0000.safetensors" for n in (1, 2))
    keep = new.read_bytes()
    new.unlink()
    assert newest(root)[0] == 1
    assert f"{new}: is missing" in capsys.readouterr().err
    shutil.copy(old, new)
    assert newest(root)[0] == 1
    assert "wrong bytes" in capsys.readouterr().err
    new.unlink()
    for target in (old, root.parent / "copy of new"):
        (root.parent / "copy of new").write_bytes(keep)
        new.symlink_to(target)
        assert newest(root)[0] == 1
        new.unlink()
    os.mkfifo(new)
    assert newest(root)[0] == 1
    assert "not a regular file" in capsys.readouterr().err
    new.unlink()
    new.mkdir()
    assert newest(root)[0] == 1
    new.rmdir()
    new.write_bytes(keep)
    for name in ("manifest.json", "COMPLETE"):
        shutil.copy(old.parent / name, new.parent / name)
    assert newest(root)[0] == 1  # the whole of step 1's papers over step 2's data
    shutil.copy(old, new)
    assert newest(root)[0] == 1  # step 1 under the name of step 2


def test_damage_between_opening_and_loading_is_found(root: Path) -> None:
    store = CheckpointStore(root)
    info = store.latest()
    assert info
    path = info.path / "rank-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UnfitError, match=r"rank-0000.safetensors: has wrong bytes"):
        store.load(info, tiny_state(3))


def test_nothing_good_left_is_an_error_and_not_a_fresh_start(root: Path) -> None:
    for path in root.glob("*/rank-0000.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UnfitError, match="all 2 checkpoints are damaged"):
        CheckpointStore(root).latest()


def test_training_on_after_a_fallback_replaces_the_damaged_step(root: Path) -> None:
    path = root / "step-000002" / "rank-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    store = CheckpointStore(root, keep=2)
    assert store.latest() is not None and store.steps() == [1]
    store.save_async(2, tiny_state(2), {})
    store.wait()
    assert newest(root)[0] == 2 and same(newest(root)[1], tiny_state(2)) and store.steps() == [1, 2]


def test_random_mixtures_of_two_checkpoints_never_load(root: Path) -> None:
    """Any file of step 1 in the place of step 2's, any block of it, any two blocks exchanged."""
    chooser = random.Random(0)
    old, new = root / "step-000001", root / "step-000002"
    good = {path.name: path.read_bytes() for path in new.iterdir()}
    for _ in range(100):
        name = chooser.choice(sorted(good))
        data, other = bytearray(good[name]), (old / name).read_bytes()
        start = chooser.randrange(min(len(data), len(other)))
        end = chooser.randrange(start, min(len(data), len(other))) + 1
        data[start:end] = other[start:end]
        (new / name).write_bytes(data)
        changed = bytes(data) != good[name]
        try:
            assert newest(root)[0] == (1 if changed else 2)
        except AnychipError as error:
            pytest.fail(str(error))
        (new / name).write_bytes(good[name])
