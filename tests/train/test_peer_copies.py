"""Copies on several hosts: what one host lost another has, and what is damaged everywhere is never used."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from emulated_hosts import memory_of, run_hosts
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from anychip.train.checkpoint import CheckpointStore
from anychip.train.memory import MemoryCopies, transfer
from anychip.train.memory import copies as copies_module
from anychip.train.memory.hosts import Hosts

SHAPES = {"model.rows": (9, 7), "model.columns": (3, 8), "optimizer.moment": (64, 33), "optimizer.step": ()}
ROWS: dict[str, Placement] = {"model.rows": Shard(0), "model.columns": Shard(1), "optimizer.moment": Shard(0)}
COLUMNS: dict[str, Placement] = {"model.rows": Shard(1), "optimizer.moment": Shard(1)}


def full_state(step: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(step)) for name, shape in SHAPES.items()}


def laid_out(state: dict[str, Tensor], placements: dict[str, Placement]) -> dict[str, Tensor]:
    if not dist.is_initialized():
        return state
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(t, mesh, [placements.get(name, Replicate())]) for name, t in state.items()}


def open_copies(folder: Path, peers: int = 1) -> MemoryCopies:
    (folder / "run").mkdir(exist_ok=True)
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    return MemoryCopies(folder / "run", peers, group)


def make(copies: MemoryCopies, step: int, placements: dict[str, Placement] = ROWS) -> None:
    state = laid_out(full_state(step), placements)
    copies.save_async(step, state, {"step": step})
    for tensor in state.values():  # what comes after does not matter to the copy
        tensor.zero_()
    copies.wait()


def save(argument: tuple[Path, list[int], int]) -> None:
    folder, steps, peers = argument
    transfer._PIECE_BYTES = 1000  # several pieces a file
    copies = open_copies(folder, peers)
    copies.prepare(laid_out(full_state(0), ROWS))
    for step in steps:
        make(copies, step)


def found_step(copies: MemoryCopies, placements: dict[str, Placement]) -> int:
    """The newest step that the processes can fill their state from, all of it compared; 0 for none."""
    into = laid_out({name: torch.zeros(shape) for name, shape in SHAPES.items()}, placements)
    for found in copies.find(1):
        info = copies.fetch(found, into, part=False)
        CheckpointStore(info.path).load(info, into)
        assert info.extra == {"step": found.step}
        for name, expected in full_state(found.step).items():
            tensor = into[name]
            assert torch.equal(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, expected), name
        return found.step
    return 0


def expect(argument: tuple[Path, int, dict[str, Placement]]) -> None:
    folder, step, placements = argument
    transfer._PIECE_BYTES = 1000
    assert found_step(open_copies(folder), placements) == step


def parts(folder: Path, host: int) -> list[str]:
    return sorted(path.name for path in memory_of(folder, host).glob("anychip-copies-*/step-*/*.safetensors"))


def lose(folder: Path, host: int) -> None:
    shutil.rmtree(memory_of(folder, host))


def flip(folder: Path, host: int, name: str) -> None:
    (path,) = memory_of(folder, host).glob(f"anychip-copies-*/step-*/{name}")
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def shards(*ranks: int) -> list[str]:
    return [f"rank-{rank:04d}.safetensors" for rank in ranks]


def test_a_lost_host_is_made_good_from_its_neighbour(tmp_path: Path) -> None:
    run_hosts([2, 2], save, (tmp_path, [1, 2], 1), tmp_path)
    for host in (0, 1):
        assert parts(tmp_path, host) == shards(0, 1, 2, 3)
        assert [path.name[:11] for path in memory_of(tmp_path, host).glob("*/step-*")] == ["step-000002"]
    lose(tmp_path, 1)
    run_hosts([2, 2], expect, (tmp_path, 2, ROWS), tmp_path)
    assert set(shards(2, 3)) <= set(parts(tmp_path, 1)) < set(shards(0, 1, 2, 3)), "no more than its processes need"


@pytest.mark.parametrize(("layout", "placements"), [([1], {}), ([1, 1], COLUMNS), ([1, 2], COLUMNS)])
def test_any_number_of_hosts_and_processes_goes_on(
    tmp_path: Path, layout: list[int], placements: dict[str, Placement]
) -> None:
    run_hosts([2, 2], save, (tmp_path, [5], 1), tmp_path)
    lose(tmp_path, 1)
    run_hosts(layout, expect, (tmp_path, 5, placements), tmp_path)


def test_a_ring_of_hosts_with_two_peers_survives_two(tmp_path: Path) -> None:
    run_hosts([1, 1, 1, 1], save, (tmp_path, [7], 2), tmp_path)
    assert [parts(tmp_path, host) for host in range(4)] == [
        shards(*r) for r in [(0, 2, 3), (0, 1, 3), (0, 1, 2), (1, 2, 3)]
    ]
    lose(tmp_path, 1)
    lose(tmp_path, 2)
    run_hosts([1, 1, 1, 1], expect, (tmp_path, 7, ROWS), tmp_path)


def test_what_no_host_holds_is_not_found(tmp_path: Path) -> None:
    run_hosts([1, 1], save, (tmp_path, [3], 0), tmp_path)
    lose(tmp_path, 1)
    run_hosts([1, 1], expect, (tmp_path, 0, ROWS), tmp_path)


def test_a_damaged_part_is_taken_from_the_other_host(tmp_path: Path) -> None:
    run_hosts([1, 1], save, (tmp_path, [3], 1), tmp_path)
    flip(tmp_path, 1, "rank-0001.safetensors")
    flip(tmp_path, 0, "rank-0000.json")
    run_hosts([1, 1], expect, (tmp_path, 3, ROWS), tmp_path)


@pytest.mark.parametrize("name", ["rank-0001.safetensors", "rank-0001.json"])
def test_a_part_damaged_wherever_it_is_left_is_never_used(tmp_path: Path, name: str) -> None:
    run_hosts([1, 1], save, (tmp_path, [3], 1), tmp_path)
    lose(tmp_path, 1)
    flip(tmp_path, 0, name)
    run_hosts([1, 1], expect, (tmp_path, 0, ROWS), tmp_path)


def test_when_a_host_has_no_room_the_copy_before_stays_and_one_warning_is_enough(tmp_path: Path) -> None:
    run_hosts([1, 1], _fill_up, tmp_path, tmp_path)


def _fill_up(folder: Path) -> None:
    copies, said, write = open_copies(folder), StringIO(), os.pwritev
    make(copies, 1)

    def full(descriptor: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with redirect_stderr(said):
        os.pwritev = full if dist.get_rank() == 1 else write  # type: ignore[assignment]
        make(copies, 2)
        make(copies, 3)
        assert found_step(copies, ROWS) == 1
        os.pwritev = write
        make(copies, 4)
        assert found_step(copies, ROWS) == 4
    expected = 1 if dist.get_rank() == 0 else 0
    assert said.getvalue().count("rank 1: No space left on device") == said.getvalue().count("warning") == expected


def die_in_the_copy_of_step_2(argument: tuple[Path, int]) -> None:
    """`writers` processes write their parts of it, then all are killed."""
    folder, writers = argument
    copies, write_part = open_copies(folder), copies_module.write_part
    make(copies, 1)

    def write_and_die(*arguments: Any) -> Any:
        if not dist.is_initialized() or dist.get_rank() < writers:
            write_part(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    copies_module.write_part = write_and_die
    make(copies, 2)


def cut_short(folder: Path, layout: list[int], writers: int) -> None:
    with pytest.raises(AssertionError, match="exit codes"):
        run_hosts(layout, die_in_the_copy_of_step_2, (folder, writers), folder)
    assert steps_on(folder, 0) == [1, 2]


def steps_on(folder: Path, host: int) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in memory_of(folder, host).glob("*/step-*"))


class TwoCopies:
    """The memory of a host has room for two copies of the size of the largest; `beside` is what lies there when a part
    of each step is about to be written."""

    def __init__(self) -> None:
        self.beside: dict[int, list[int]] = {}
        self._write_part = copies_module.write_part
        copies_module.write_part = self._write

    def _write(self, directory: Path, step: int, *rest: Any) -> Any:
        others = {path: copies_module._bytes_below(path) for path in directory.parent.glob("step-*")}
        others.pop(directory, None)
        self.beside[step] = sorted(copies_module.step_of(path.name) for path in others)
        if sum(others.values()) > max(others.values()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write_part(directory, step, *rest)


def test_a_copy_that_a_kill_cut_short_takes_no_room_from_the_next(tmp_path: Path) -> None:
    cut_short(tmp_path, [1, 1], writers=1)
    run_hosts([1, 1], _go_on_from_the_whole_one, tmp_path, tmp_path)


def _go_on_from_the_whole_one(folder: Path) -> None:
    copies, room = open_copies(folder), TwoCopies()
    assert found_step(copies, ROWS) == 1
    assert steps_on(folder, 0) == [1, 2], "nothing is removed by looking"
    make(copies, 3)
    assert room.beside == {3: [1]}
    assert found_step(copies, ROWS) == 3 and steps_on(folder, 0) == [3]


def test_nor_does_the_one_before_a_newer_one_that_is_whole(tmp_path: Path) -> None:
    cut_short(tmp_path, [1], writers=1)
    run_hosts([1], _go_on_from_the_newer_one, tmp_path, tmp_path)


def _go_on_from_the_newer_one(folder: Path) -> None:
    copies, room = open_copies(folder), TwoCopies()
    assert found_step(copies, {}) == 2
    make(copies, 3)
    assert room.beside == {3: [2]} and found_step(copies, {}) == 3


def test_what_too_few_hosts_hold_lets_the_one_before_stay_as_long_as_there_is_room(tmp_path: Path) -> None:
    cut_short(tmp_path, [1, 1], writers=2)
    run_hosts([1, 1], _go_on_from_the_newer_of_two_hosts, tmp_path, tmp_path)


def _go_on_from_the_newer_of_two_hosts(folder: Path) -> None:
    copies, room = open_copies(folder), TwoCopies()
    assert found_step(copies, ROWS) == 2
    make(copies, 3)
    assert steps_on(folder, 0) == [1, 2], "there was no room"
    make(copies, 4)
    assert room.beside == {3: [1, 2], 4: [2]} and found_step(copies, ROWS) == 4


def test_before_a_state_was_looked_for_nothing_is_removed_for_room(tmp_path: Path) -> None:
    cut_short(tmp_path, [1], writers=1)
    run_hosts([1], _make_without_looking, tmp_path, tmp_path)


def _make_without_looking(folder: Path) -> None:
    TwoCopies()
    make(open_copies(folder), 3)
    assert steps_on(folder, 0) == [1, 2]


def test_a_run_that_went_back_never_finds_what_it_left_behind(tmp_path: Path) -> None:
    run_hosts([1, 1], save, (tmp_path, [8], 1), tmp_path)
    away = tmp_path / "away"
    memory_of(tmp_path, 1).rename(away)  # with a whole copy of step 8
    run_hosts([1], _start_over, tmp_path, tmp_path)
    lose(tmp_path, 1)
    away.rename(memory_of(tmp_path, 1))
    run_hosts([1, 1], expect, (tmp_path, 6, ROWS), tmp_path)
    assert len(list(memory_of(tmp_path, 1).iterdir())) == 1


def _start_over(folder: Path) -> None:
    copies = open_copies(folder)
    copies.start_over()
    make(copies, 6)


def test_parts_of_two_attempts_at_a_step_are_never_put_together(tmp_path: Path) -> None:
    for _ in range(2):
        run_hosts([1, 1], _attempt, tmp_path, tmp_path)
    first, second = sorted(memory_of(tmp_path, 0).glob("*/step-*"), key=lambda path: path.stat().st_mtime)
    shutil.rmtree(second)
    shutil.rmtree(memory_of(tmp_path, 1) / first.relative_to(memory_of(tmp_path, 0)))
    run_hosts([1, 1], expect, (tmp_path, 0, ROWS), tmp_path)


def _attempt(folder: Path) -> None:
    copies = open_copies(folder, peers=0)
    copies_module.copies_in = lambda folder: []  # type: ignore[assignment]  # the one before is not removed
    make(copies, 3)


def test_a_copy_of_the_run_is_another_run(tmp_path: Path) -> None:
    run_hosts([1, 1], save, (tmp_path, [2], 1), tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "other" / "run")
    run_hosts([1, 1], _expect_in_other, tmp_path, tmp_path)
    run_hosts([1, 1], expect, (tmp_path, 2, ROWS), tmp_path)


def _expect_in_other(folder: Path) -> None:
    assert found_step(open_copies(folder / "other"), ROWS) == 0


@pytest.mark.parametrize(
    ("of_rank", "peers", "expected"),
    [
        ((0, 0, 1, 1), 1, [[2], [3], [0], [1]]),
        ((0, 0, 1, 1), 5, [[2], [3], [0], [1]]),
        ((0, 1, 2), 2, [[1, 2], [2, 0], [0, 1]]),
        ((0, 0, 0, 1), 1, [[3], [3], [3], [0]]),
        ((0, 0), 1, [[], []]),
        ((0, 1), 0, [[], []]),
    ],
)
def test_mirrors_are_on_other_hosts(of_rank: tuple[int, ...], peers: int, expected: list[list[int]]) -> None:
    hosts = Hosts(of_rank, 0)
    assert [hosts.mirrors(rank, peers) for rank in range(len(of_rank))] == expected
