"""Old .bin files: read bit for bit, and nothing in them ever runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import published_weights, tiny_recipe, tiny_tokenizer, write_config
from torch import Tensor, nn

from anychip.errors import InputError
from anychip.families.telechat2 import published_tensors
from anychip.interchange.layout import to_logical
from anychip.interchange.load import load_for_inference
from anychip.interchange.published import PublishedDirectory
from anychip.interchange.source import read_tensor
from anychip.interchange.torch_bin import TorchBinFile

CONFIG = tiny_recipe().model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published directory that lacks only its weights."""
    tiny_tokenizer().save(tmp_path / "model")
    write_config(tmp_path / "model")
    return tmp_path / "model"


def read_all(path: Path) -> dict[str, Tensor]:
    file = TorchBinFile(path)
    return {name: read_tensor(file, name) for name in file.entries}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_bin_is_read_bit_for_bit(dtype: torch.dtype, folder: Path) -> None:
    weights = published_weights(CONFIG, dtype)
    weights["transformer.ln_f.weight"][:4] = torch.tensor([float("nan"), float("inf"), -0.0, 6e-8]).to(dtype)
    torch.save(weights, folder / "pytorch_model.bin")
    directory = PublishedDirectory(folder)
    assert all(same_bits(directory.read(name), weight) for name, weight in weights.items())


def test_a_sharded_bin_loads_as_a_model(folder: Path) -> None:
    weights = published_weights(CONFIG, torch.float16)
    names, weight_map = list(weights), {}
    for number in range(3):
        file = f"pytorch_model_{number + 1:05d}-of-00003.bin"
        torch.save({name: weights[name] for name in names[number::3]}, folder / file)
        weight_map.update(dict.fromkeys(names[number::3], file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    parameters = dict(load_for_inference(folder).decoder.named_parameters())
    for tensor in published_tensors(CONFIG):
        for name, part in to_logical(CONFIG, tensor, weights[tensor.name]).items():
            assert same_bits(parameters[name], part)


def test_tied_storages_views_parameters_and_scalars(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).view(10, 6)
    state = {
        "whole": base,
        "tied": base,
        "rows": base[3:5],
        "flat": base.view(-1)[7:11],
        "parameter": nn.Parameter(torch.randn(3, 2)),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 6),
        "one column": base[:, :1][:1],
    }
    torch.save(state, tmp_path / "x.bin")
    found = read_all(tmp_path / "x.bin")
    assert found.keys() == state.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_modules_state_dict_with_its_metadata_and_every_protocol(protocol: int, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).half()
    torch.save(module.state_dict(), tmp_path / "x.bin", pickle_protocol=protocol)
    found = read_all(tmp_path / "x.bin")
    assert all(same_bits(found[name], tensor) for name, tensor in module.state_dict().items())
    assert found["1.num_batches_tracked"].dtype == torch.int64


def test_long_names_and_many_tensors(tmp_path: Path) -> None:
    state = OrderedDict((f"{'long' * 80}.{n}", torch.full((2,), float(n))) for n in range(1500))
    torch.save(state, tmp_path / "x.bin")
    assert all(same_bits(tensor, state[name]) for name, tensor in read_all(tmp_path / "x.bin").items())


def test_buffers_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    weights = published_weights(CONFIG)
    buffers = {
        "transformer.h.0.self_attention.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.attn.masked_bias": torch.tensor(0.0),
    }
    torch.save({**weights, **buffers}, folder / "pytorch_model.bin")
    assert set(PublishedDirectory(folder)._files) == set(weights)


# Hostile programs. `CANARY` is the file that a careless reader would create.


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def write_zip(path: Path, program: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)


def global_call(module: str, name: str, argument: str) -> bytes:
    """The program `module.name(argument)` in the oldest opcodes."""
    text = argument.encode()
    push = b"X" + struct.pack("<I", len(text)) + text
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + push + b"tR."


EVIL: dict[str, tuple[Callable[[str], bytes], str]] = {
    "os.system": (lambda canary: pickle.dumps({"w": Runs(os.system, f"touch {canary}")}, 2), r"posix\.system"),
    "os.system, protocol 4": (lambda canary: pickle.dumps({"w": Runs(os.system, f"touch {canary}")}, 4), "system"),
    "builtins.open": (lambda canary: pickle.dumps(Runs(open, canary, "w"), 2), r"open"),
    "eval": (lambda canary: global_call("builtins", "eval", f"open({canary!r}, 'w')"), r"builtins\.eval"),
    "exec": (lambda canary: global_call("__builtin__", "exec", f"open({canary!r}, 'w')"), r"__builtin__\.exec"),
    "getattr": (lambda canary: global_call("builtins", "getattr", "x"), r"builtins\.getattr"),
    "torch.load": (lambda canary: global_call("torch", "load", canary), r"torch\.load"),
    "torch.hub": (lambda canary: global_call("torch.hub", "load", canary), r"torch\.hub\.load"),
    "a known global with a dotted tail": (lambda canary: global_call("torch._utils", "os.system", canary), "os.system"),
    "terminal escapes in the name": (lambda canary: global_call("\x1b[2J", "x", canary), r"\\x1b\[2J"),
    "INST": (lambda canary: b"\x80\x02(X\x01\0\0\0xios\nsystem\n.", "INST"),
    "extension registry": (lambda canary: b"\x80\x02\x82\x01.", "EXT1"),
    "NEWOBJ": (lambda canary: b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "textual persistent id": (lambda canary: b"Phttp://x\n.", "PERSID"),
    "OrderedDict with arguments": (lambda canary: b"\x80\x02ccollections\nOrderedDict\n(]tR.", "calls something"),
    "a storage called": (lambda canary: b"\x80\x02ctorch\nFloatStorage\n)R.", "calls something"),
}


@pytest.mark.parametrize("kind", EVIL)
def test_a_program_that_would_run_is_refused_by_name_and_does_not_run(kind: str, tmp_path: Path) -> None:
    make, words = EVIL[kind]
    canary = tmp_path / "canary"
    write_zip(tmp_path / "pytorch_model.bin", make(str(canary)))
    with pytest.raises(InputError, match=words) as error:
        TorchBinFile(tmp_path / "pytorch_model.bin")
    assert not canary.exists()
    paragraph = error.value.paragraph
    assert paragraph.startswith(str(tmp_path / "pytorch_model.bin")) and paragraph.isprintable()
    assert "safetensors" in paragraph


def nested_tuple(depth: int) -> bytes:
    """A tuple of 2 ** depth leaves in a few bytes: each level holds the one before twice."""
    return b"K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (n % 200, n % 200, (n + 1) % 200) for n in range(depth))


def storage_id(key: bytes = b"X\x01\0\0\x000", elements: bytes = b"K\x04") -> bytes:
    return b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\x03\0\0\0cpu" + elements + b"tQ"


def tensor(shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", offset: bytes = b"K\0", **more: bytes) -> bytes:
    record = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage_id(**more) + offset + shape + stride
    return b"\x80\x02}X\x01\0\0\0w" + record + b"\x89ccollections\nOrderedDict\n)RtRs."


STRANGE = {
    "nested tuple as key": b"\x80\x02}" + nested_tuple(100) + b"K\x01s.",
    "nested tuple as a global's name": b"\x80\x02" + nested_tuple(100) + b"X\x01\0\0\0x\x93.",
    "nested tuple as shape": tensor(shape=nested_tuple(100)),
    "nested tuple as storage key": tensor(key=nested_tuple(100)),
    "a million marks": b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
    "no mark": b"\x80\x02Nt.",
    "empty stack": b"\x80\x02.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "unknown opcode": b"\x80\x02\xff.",
    "a list": b"\x80\x02].",
    "memo that was never set": b"\x80\x02h\x05.",
    "names that are numbers": b"\x80\x02}K\x01K\x02s.",
    "a value without key": b"\x80\x02}(K\x01u.",
    "negative length": tensor(shape=b"J\xff\xff\xff\xff\x85"),
    "negative offset": tensor(offset=b"J\xff\xff\xff\xff"),
    "huge offset": tensor(offset=b"J\xff\xff\xff\x7f"),
    "huge shape": tensor(shape=b"\x8a\x08\0\0\0\0\0\0\0\x40\x85"),
    "shape of a bool": tensor(shape=b"\x88\x85"),
    "columns before rows": tensor(shape=b"K\x02K\x02\x86", stride=b"K\x01K\x02\x86"),
    "shape and stride of other ranks": tensor(stride=b"K\x01K\x01\x86"),
    "more elements than bytes": tensor(shape=b"K\x05\x85", elements=b"K\x05"),
    "another storage size": tensor(elements=b"K\x03"),
    "a storage that is not there": tensor(key=b"X\x01\0\0\x001"),
    "a storage key that climbs": tensor(key=b"X\x08\0\0\0../../up"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.timeout(20)
def test_strange_programs_are_refused_quickly(kind: str, tmp_path: Path) -> None:
    write_zip(tmp_path / "x.bin", STRANGE[kind], {"0": bytes(16)})
    with pytest.raises(InputError, match=r"x\.bin"):
        TorchBinFile(tmp_path / "x.bin")


def test_the_hand_made_tensor_is_right_where_nothing_is_strange(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.bin", tensor(), {"0": torch.arange(4.0).numpy().tobytes()})
    assert torch.equal(read_all(tmp_path / "x.bin")["w"], torch.arange(4.0))


def saved(folder: Path) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save({"w": torch.arange(1000.0)}, path)
    return path


def refused(path: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        read_all(path)
    assert str(path) in error.value.paragraph and error.value.do


def test_legacy_files_are_refused_with_their_age(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    refused(path, r"before 1\.6")


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    path, squeezed = saved(tmp_path), tmp_path / "squeezed.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(squeezed, "compressed")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(squeezed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED)
    refused(squeezed, "compressed")


@pytest.mark.parametrize("keep", [0, 10, 300, 2000, -1, -100])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "truncated|not a torch zip")


def test_other_zip_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    refused(path, "without tensors")
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", tensor())
        archive.writestr("archive/data.pkl", tensor())
    refused(path, "twice")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor())
        archive.writestr("archive/byteorder", "big")
        archive.writestr("archive/data/0", bytes(16))
    refused(path, "little-endian")


def test_pipes_folders_and_missing_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    refused(tmp_path / "pipe.bin", "not a regular file")
    (tmp_path / "folder.bin").mkdir()
    refused(tmp_path / "folder.bin", "not a regular file")
    refused(tmp_path / "missing.bin", "No such file")


def test_torch_itself_reads_the_same_from_these_files(tmp_path: Path) -> None:
    """The hand-made program is one that PyTorch accepts, so the tests above speak of its format."""
    write_zip(tmp_path / "x.bin", tensor(), {"0": torch.arange(4.0).numpy().tobytes()})
    with zipfile.ZipFile(tmp_path / "x.bin", "a") as archive:
        archive.writestr("archive/version", "3\n")
    state = torch.load(io.BytesIO((tmp_path / "x.bin").read_bytes()), weights_only=True)
    assert torch.equal(state["w"], torch.arange(4.0))
