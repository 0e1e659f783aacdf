"""What goes in comes out: every dtype and layout, in the background and streamed; retention; refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_state import litter, newest, same, tiny_state
from torch import Tensor

from anychip.errors import InputError
from anychip.train.checkpoint import CheckpointError, CheckpointStore
from anychip.train.checkpoint import save as save_module

ALL_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool, torch.complex64,
]  # fmt: skip


def test_round_trip_is_bit_exact_and_other_tools_can_read_it(tmp_path: Path) -> None:
    state = tiny_state(1)
    report = CheckpointStore(tmp_path).save(3, state, {"tokens": 12, "名": ["电信", None, 0.1]})
    step, loaded = newest(tmp_path)
    assert step == 3 and same(state, loaded) and not litter(tmp_path)
    assert report.nbytes == sum(tensor.nbytes for tensor in state.values())
    info = CheckpointStore(tmp_path).latest()
    assert info and info.extra == {"tokens": 12, "名": ["电信", None, 0.1]}
    assert same(state, load_file(info.path / "rank-0000.safetensors"))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (8, 48), dtype=torch.uint8)
    tensor = raw.bool() if dtype == torch.bool else raw.view(dtype)
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": tensor, "scalar": tensor[0, 0].clone()}, {})
    info = store.latest()
    assert info
    into = {"x": torch.zeros_like(tensor), "scalar": torch.zeros_like(tensor[0, 0])}
    store.load(info, into)
    assert torch.equal(into["x"].view(torch.uint8), tensor.view(torch.uint8))
    assert into["scalar"].numpy(force=True).tobytes() == tensor[0, 0].numpy(force=True).tobytes() if dtype not in (
        torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2) else True  # fmt: skip


def test_background_save_equals_blocking_save_although_training_goes_on(tmp_path: Path) -> None:
    state = tiny_state(5) | {"model.large": torch.randn(512, 600)}
    CheckpointStore(tmp_path / "sync").save(4, state, {"a": 1})
    store = CheckpointStore(tmp_path / "async")
    store.prepare(state)
    store.save_async(4, state, {"a": 1})
    for tensor in state.values():
        tensor.zero_()
    report = store.wait()
    assert report and report.stall_seconds <= report.seconds
    for name in ("rank-0000.safetensors", "manifest.json", "COMPLETE"):
        blocking, background = (tmp_path / kind / "step-000004" / name for kind in ("sync", "async"))
        assert blocking.read_bytes() == background.read_bytes()


def test_saves_queue_one_behind_the_other(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 6):
        store.save_async(step, tiny_state(step), {})
    store.wait()
    assert store.steps() == [1, 2, 3, 4, 5]
    for step in store.steps():
        info = store.open(step)
        assert same(dict(store.read(info)), tiny_state(step))


def test_failed_background_save_is_told_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tiny_state(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(save_module, "publish", _no_space)
        store.save_async(2, tiny_state(2), {})
        with pytest.raises(CheckpointError, match="No space left on device"):
            store.wait()
        store.save_async(3, tiny_state(3), {})
        store._join()
    assert newest(tmp_path)[0] == 1 and not litter(tmp_path)
    store.save_async(4, tiny_state(4), {})
    assert "step-000003" in capsys.readouterr().err
    report = store.wait()
    assert report and report.step == 4 and store.steps() == [1, 4]


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_retention_keeps_the_newest_good_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, tiny_state(step), {})
    assert store.steps() == [2, 3] and not litter(tmp_path)
    shard = tmp_path / "step-000003" / "rank-0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    store = CheckpointStore(tmp_path, keep=1)
    assert newest(tmp_path)[0] == 2
    store.latest()
    store.save(4, tiny_state(4), {})
    assert store.steps() == [4]


def test_a_good_step_is_never_overwritten_but_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tiny_state(1), {})
    with pytest.raises(InputError, match="not overwritten"):
        store.save(1, tiny_state(2), {})
    assert same(newest(tmp_path)[1], tiny_state(1))
    shard = tmp_path / "step-000001" / "rank-0000.safetensors"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    store.save(1, tiny_state(2), {})
    assert same(newest(tmp_path)[1], tiny_state(2)) and not litter(tmp_path)


def test_load_refuses_what_does_not_fit_and_changes_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = tiny_state(1)
    store.save(1, state, {})
    info = store.latest()
    assert info
    wrong: dict[str, dict[str, Tensor]] = {
        "lacks model.other": state | {"model.other": torch.zeros(1)},
        "also holds model.half": {name: state[name] for name in state if name != "model.half"},
        r"model.weight \(checkpoint F32 \[7, 5\], here F32 \[5, 7\]\)": state | {"model.weight": torch.zeros(5, 7)},
        "here F64": state | {"model.weight": torch.zeros(7, 5, dtype=torch.float64)},
    }
    for message, tensors in wrong.items():
        into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        with pytest.raises(InputError, match=message):
            store.load(info, into)
        assert not any(tensor.any() for tensor in into.values())


def test_whole_groups_may_be_left_out(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = tiny_state(1)
    store.save(1, state, {})
    info = store.latest()
    assert info
    model = {name: torch.ones_like(tensor) for name, tensor in state.items() if name.startswith("model.")}
    store.load(info, model)
    assert same(model, {name: state[name] for name in model})


def test_stream_writes_tensor_by_tensor_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "_STREAM_HEADER_BYTES", 1024)
    tensors = {f"model.layers.{n}.weight": torch.randn(3, n) for n in range(40)}
    store = CheckpointStore(tmp_path)
    with store.stream(0, {"weights_only": True}) as stream:
        for name, tensor in tensors.items():
            buffer = tensor.clone()
            stream.add(name, buffer)
            buffer.zero_()  # the caller may use its memory again
        with pytest.raises(InputError, match="twice"):
            stream.add("model.layers.3.weight", torch.zeros(1))
    info = store.latest()
    assert info and len(info.manifest.files) > 2 and info.extra == {"weights_only": True}
    assert same(tensors, {k: v for file in info.manifest.files for k, v in load_file(info.path / file).items()})
    assert [name for name, _ in store.read(info)] == list(tensors)
    assert same(
        dict(store.read(info, ["model.layers.7.weight"])), {"model.layers.7.weight": tensors["model.layers.7.weight"]}
    )
    with pytest.raises(InputError, match=r"model\.none"):
        next(store.read(info, ["model.none"]))


def test_an_error_inside_a_stream_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(ZeroDivisionError), store.stream(0, {}) as stream:
        stream.add("x", torch.zeros(3))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir()) and store.latest() is None


@pytest.mark.parametrize("extra", [{"x": float("nan")}, {"x": {1}}, {1: 2}, {"x": (1, 2)}], ids=str)
def test_extra_must_be_json(tmp_path: Path, extra: dict[str, object]) -> None:
    with pytest.raises(InputError, match="extra"):
        CheckpointStore(tmp_path).save(1, {}, extra)


def test_state_must_be_dense_tensors(tmp_path: Path) -> None:
    for bad in (3, torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.complex128)):
        with pytest.raises(InputError, match="'x'"):
            CheckpointStore(tmp_path).save(1, {"x": bad}, {})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="a@b"):
        CheckpointStore(tmp_path).save(1, {"a@b": torch.zeros(1)}, {})


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with store.stream(1, {}) as stream:
        stream.add("x", torch.zeros(3))
        with pytest.raises(CheckpointError, match="another process is saving"):
            CheckpointStore(tmp_path).save(2, {"x": torch.zeros(3)}, {})
    assert store.steps() == [1] and not litter(tmp_path)


def test_saving_at_the_end_of_the_process_is_finished(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch; from pathlib import Path; from anychip.train.checkpoint import CheckpointStore\n"
        "CheckpointStore(Path(sys.argv[1])).save_async(1, {'x': torch.arange(20_000_000)}, {})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=100)
    assert torch.equal(newest(tmp_path)[1]["x"], torch.arange(20_000_000))


def test_background_saves_use_one_copy_of_the_state_however_many_there_are(tmp_path: Path) -> None:
    """The bound on host memory: one staging buffer of this process's part, plus the windows of the writer."""
    import os
    import subprocess
    import sys

    code = """
import resource, sys, torch
from pathlib import Path
from anychip.train.checkpoint import CheckpointStore
state = {f"model.{n}": torch.ones(2 << 20) for n in range(6)}  # 48 MiB
size = sum(t.nbytes for t in state.values())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
store = CheckpointStore(Path(sys.argv[1]), keep=1)
CheckpointStore(Path(sys.argv[1]) / "warm").save(1, {"x": torch.ones(4 << 20)}, {})
before = peak()
store.prepare(state)
buffer = store._staging._memory.data_ptr()
growth = []
for step in range(1, 6):
    store.save_async(step, state, {})  # the next one waits for it
    growth.append((peak() - before) / size)
store.wait()
assert store._staging._memory.data_ptr() == buffer and store._staging._memory.numel() < size + 64 * len(state) + 1
print(*growth, (peak() - before) / size)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=250, env=environment
    )
    assert run.returncode == 0, run.stderr
    growth = [float(word) for word in run.stdout.split()]
    assert growth[-1] < 1.5 and growth[-1] - growth[1] < 0.1, growth
