"""Growth of a checkpoint on disk: any layout in, the same bytes out whoever makes them, and after kill -9 too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from growing import growth, random_state, small_model

from anychip.errors import InputError, UnfitError
from anychip.files import sha256_file
from anychip.grow.plan import plan_growth
from anychip.grow.source import CheckpointRows
from anychip.grow.state import grow_state
from anychip.grow.stream import Stream, grow_checkpoint
from anychip.grow.units import units
from anychip.train.checkpoint import CheckpointStore
from anychip.train.checkpoint.manifest import Chunk

OLD = small_model()
STEP = growth(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=5, vocab_size=48)


def saved(root: Path) -> dict[str, torch.Tensor]:
    state = random_state(OLD, torch.float32)
    CheckpointStore(root).save(7, state, {"guard": {}})
    return state


def stream_of(root: Path, target: Path) -> Stream:
    return Stream(CheckpointStore(root).open(7), plan_growth(OLD, STEP, 3), target, {"identity": "next"})


def test_a_checkpoint_grows_into_what_its_state_grows_into(tmp_path: Path) -> None:
    state = saved(tmp_path / "old")
    stream = stream_of(tmp_path / "old", tmp_path / "new")
    proof = grow_checkpoint(stream)
    store = CheckpointStore(tmp_path / "new")
    info = store.latest()
    assert info is not None
    grown = grow_state(stream.plan, state)
    assert dict(store.read(info)).keys() == grown.keys()
    assert all(torch.equal(tensor, grown[name]) for name, tensor in store.read(info))
    assert proof is not None and proof.passed and info.extra["identity"] == "next"
    (lineage,) = info.extra["lineage"]
    assert lineage["parent"] == stream.parent_digest and lineage["proof"]["passed"]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["step-000007"]
    with pytest.raises(InputError, match="not overwritten"):
        grow_checkpoint(stream)


def test_who_opens_what_grew_checks_every_byte(tmp_path: Path) -> None:
    saved(tmp_path / "old")
    grow_checkpoint(stream_of(tmp_path / "old", tmp_path / "new"))
    file = max((tmp_path / "new" / "step-000007").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UnfitError, match="wrong bytes"):
        CheckpointStore(tmp_path / "new").open(7)


def test_several_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    saved(tmp_path / "old")
    for name, processes in (("one", 1), ("two", 2)):
        grow_checkpoint(stream_of(tmp_path / "old", tmp_path / name), processes=processes, prove_it=False)
    digests = [sha256_file(tmp_path / name / "step-000007" / "manifest.json") for name in ("one", "two")]
    assert digests[0] == digests[1]


def test_rows_of_any_layout(tmp_path: Path) -> None:
    """A checkpoint cut by columns and rows, as tensor parallel ranks write it, is read as one that is whole."""
    state = saved(tmp_path)
    info = CheckpointStore(tmp_path).open(7)
    name = "model.lm_head.weight"
    entry, data = info.manifest.tensors[name], state[name]
    parts, chunks = [data[:20, :6], data[:20, 6:], data[20:, :6], data[20:, 6:]], []
    with (tmp_path / "cut").open("wb") as file:
        for part, offsets in zip(parts, ([0, 0], [0, 6], [20, 0], [20, 6]), strict=True):
            raw = part.contiguous().numpy().tobytes()
            chunk = entry.chunks[0].model_dump() | {
                "offsets": offsets, "sizes": list(part.shape), "start": file.tell(), "nbytes": len(raw),
            }  # fmt: skip
            chunks.append(Chunk.model_construct(**{**chunk, "file": "cut"}))
            file.write(raw)
    cut = entry.model_copy(update={"chunks": chunks})
    rows = CheckpointRows(tmp_path, info.manifest.model_copy(update={"tensors": {name: cut}}))
    wanted = torch.tensor([39, 3, 3, 21, 19, 20])
    assert torch.equal(rows.rows(name, wanted), data[wanted])
    assert torch.allclose(rows.mean_row(name), data.double().mean(0).float())


_PROGRAM = """
import sys
from pathlib import Path
import anychip.grow.units as made
made.units.__defaults__ = (16000,)
from test_growth_stream import stream_of
from anychip.grow.stream import grow_checkpoint
print("begins", flush=True)
grow_checkpoint(stream_of(Path(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_any_time_it_goes_on_to_the_same_digest(tmp_path: Path) -> None:
    """kill -9 again and again, each time a little later, until it gets through."""
    saved(tmp_path / "old")
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "old")]
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "calm")], env=environment, check=True, timeout=120)
    kills = 0
    for attempt in range(10):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        deadline = time.monotonic() + 0.2 * 2**attempt
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if process.returncode == 0:
            break
    manifests = [tmp_path / name / "step-000007" / "manifest.json" for name in ("calm", "killed")]
    assert kills >= 1
    assert sha256_file(manifests[0]) == sha256_file(manifests[1])
    assert len(json.loads(manifests[0].read_text())["files"]) > 10


def test_files_do_not_grow_with_the_model(tmp_path: Path) -> None:
    saved(tmp_path)
    parts = units(plan_growth(OLD, STEP, 3), CheckpointStore(tmp_path).open(7).manifest, 4096)
    assert len(parts) > 5
    assert all(unit.nbytes <= 4096 or len(unit.pieces) == 1 for unit in parts)
