"""No changed byte passes: flips, cuts, swaps and losses are found, named, and the checkpoint before is used.

Ten thousand of them: `pytest -s -m slow tests/checkpoint/test_checkpoint_damage.py tests/data/test_integrity.py`."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch.distributed as dist
from damages import DAMAGES, rename_another_step
from rank_pool import run_ranks
from tiny_state import newest, same, tiny_state

from anychip.errors import UnfitError
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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/{alone,together}-{a,b}: checkpoints of one process and of two, of two runs of the same shape."""
    folder = tmp_path_factory.mktemp("written")
    for run, seed in RUNS.items():
        for step in (1, 2):
            CheckpointStore(folder / f"alone-{run}").save(step, tiny_state(seed + step), {"n": step})
    run_ranks(2, _save_together, folder, folder)
    return folder


RUNS = {"a": 0, "b": 50}


def _save_together(folder: Path) -> None:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    for run, seed in RUNS.items():
        store = CheckpointStore(folder / f"together-{run}", group=group)
        for step in (1, 2):
            store.save(step, tiny_state(seed + step), {"n": step})


def _contents(step: Path) -> dict[str, object]:
    return {path.name: path.readlink() if path.is_symlink() else path.read_bytes() for path in step.iterdir()}


def outcomes(written: Path, work: Path, count: int, seed: int) -> Counter[str]:
    """Damage step 2 and load. Damages that left every byte as it was are counted apart, and not among `count`."""
    chance, seen = random.Random(seed), Counter[str]()
    first = tiny_state(1)
    while seen.total() - seen["no byte changed"] < count:
        shape = chance.choice(("alone", "together"))
        root = work / "checkpoints"
        shutil.copytree(written / f"{shape}-a", root)
        step, damage = root / "step-000002", chance.choice(DAMAGES)
        older, same_shape = root / "step-000001", written / f"{shape}-b" / step.name
        other_ranks = written / f"{'together' if shape == 'alone' else 'alone'}-a" / step.name
        other = older if damage is rename_another_step else chance.choice((older, same_shape, other_ranks))
        whole = _contents(step)
        damage(step, other, chance)
        if _contents(step) == whole:
            seen["no byte changed"] += 1
        else:
            with redirect_stderr(StringIO()) as said:
                number, state = newest(root)
            if number == 1 and same(state, first):
                named = "step 2 is passed over" in said.getvalue() and str(step) in said.getvalue()
                seen["found, named, and the one before used" if named else "found, not named"] += 1
            else:
                seen[f"missed: {damage.__name__}"] += 1
        shutil.rmtree(root)
    return seen


def test_every_damage_is_found_and_the_checkpoint_before_is_used(written: Path, tmp_path: Path) -> None:
    seen = outcomes(written, tmp_path, 300, seed=1)
    assert seen["found, named, and the one before used"] == 300, seen


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ten_thousand_damages_are_found(written: Path, memory: Path) -> None:
    seen = outcomes(written, memory, 10_000, seed=2)
    print(dict(seen))
    assert seen["found, named, and the one before used"] == 10_000, seen
