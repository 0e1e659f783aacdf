"""A manifest made by an attacker, digests and all, is refused before anything of it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_state import tiny_state

import anychip.train.checkpoint as checkpoint_package
from anychip.errors import InputError
from anychip.train.checkpoint import CheckpointStore

Change = Callable[[dict[str, Any]], object]


def _seal(directory: Path, manifest: bytes) -> None:
    (directory / "manifest.json").write_bytes(manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    (directory / "COMPLETE").write_text(f"anychip-checkpoint manifest.json sha256 {digest}\n")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    CheckpointStore(tmp_path).save(1, tiny_state(1), {})
    return tmp_path / "step-000001"


def _chunk(manifest: dict[str, Any], name: str = "model.weight") -> dict[str, Any]:
    return manifest["tensors"][name]["chunks"][0]  # type: ignore[no-any-return]


def _rename_file(manifest: dict[str, Any], name: str) -> None:
    manifest["files"][name] = manifest["files"].pop("rank-0000.safetensors")
    for tensor in manifest["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk["file"] = name


CHANGES: dict[str, Change] = {
    "parent path": lambda m: _rename_file(m, "../rank-0000.safetensors"),
    "absolute path": lambda m: _rename_file(m, "/etc/passwd"),
    "file not listed": lambda m: _chunk(m).update(file="rank-0001.safetensors"),
    "negative offset": lambda m: _chunk(m).update(offsets=[-1, 0]),
    "negative size": lambda m: _chunk(m).update(sizes=[-7, -5]),
    "negative start": lambda m: _chunk(m).update(start=-1),
    "start elsewhere": lambda m: _chunk(m).update(start=9),
    "negative bytes": lambda m: _chunk(m).update(nbytes=-140),
    "huge shape": lambda m: m["tensors"]["model.weight"].update(shape=[1 << 62, 1 << 62]),
    "huge shape and chunk": lambda m: (
        m["tensors"]["model.weight"].update(shape=[1 << 40, 1 << 40]),
        _chunk(m).update(sizes=[1 << 40, 1 << 40], nbytes=4 << 80),
    ),
    "beyond int64": lambda m: m["tensors"]["model.weight"].update(shape=[1 << 70, 0]),
    "many dimensions": lambda m: m["tensors"]["model.empty"].update(shape=[0] * 100_000),
    "chunk outside": lambda m: _chunk(m).update(offsets=[1, 0]),
    "chunk too few dimensions": lambda m: _chunk(m).update(offsets=[0]),
    "chunk twice": lambda m: m["tensors"]["model.weight"]["chunks"].append(_chunk(m)),
    "no chunks": lambda m: m["tensors"]["model.weight"].update(chunks=[]),
    "size as text": lambda m: _chunk(m).update(nbytes="140"),
    "size as fraction": lambda m: _chunk(m).update(nbytes=140.5),
    "unknown dtype": lambda m: m["tensors"]["model.weight"].update(dtype="OBJECT"),
    "unknown field": lambda m: m.update(pickle="gASVAA=="),
    "bad digest": lambda m: _chunk(m).update(sha256="zz"),
    "unknown version": lambda m: m.update(version=2),
    "other format": lambda m: m.update(format="torch"),
    "other step": lambda m: m.update(step=7),
    "name with NUL": lambda m: m["tensors"].update({"a\0b": m["tensors"].pop("model.empty")}),
    "header too large": lambda m: m["files"]["rank-0000.safetensors"].update(header_nbytes=1 << 60),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_manifests_are_refused(directory: Path, change: str) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    CHANGES[change](manifest)
    _seal(directory, json.dumps(manifest).encode())
    with pytest.raises(InputError):
        CheckpointStore(directory.parent).open(1)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\x80\x04\x95",
        b"\xff\xfe",
        b"[" * 2_000_000,
        b'{"extra":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001,
        b'{"step": ' + b"9" * 100_000 + b"}",
    ],
    ids=["empty", "null", "list", "object", "pickle", "not UTF-8", "deep lists", "deep objects", "long number"],
)
def test_other_bytes_are_refused(directory: Path, text: bytes) -> None:
    _seal(directory, text)
    with pytest.raises(InputError, match="not a usable manifest"):
        CheckpointStore(directory.parent).open(1)


def test_overlapping_chunks_of_the_right_total_are_refused(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    chunk = _chunk(manifest)
    half = {"sizes": [4, 5], "nbytes": 80}
    rest = {"sizes": [3, 5], "nbytes": 60, "start": chunk["start"] + 80, "offsets": [3, 0]}
    manifest["tensors"]["model.weight"]["chunks"] = [chunk | half, chunk | rest]
    _seal(directory, json.dumps(manifest).encode())
    with pytest.raises(InputError, match="exactly once"):
        CheckpointStore(directory.parent).open(1)


def test_the_sealed_original_is_accepted(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    _seal(directory, json.dumps(manifest, indent=1).encode())
    assert CheckpointStore(directory.parent).open(1).step == 1


def test_loading_executes_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def executed(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was loaded")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, executed)
    store = CheckpointStore(directory.parent)
    info = store.latest()
    assert info
    store.load(info, tiny_state(2))
    sources = "".join(path.read_text() for path in Path(checkpoint_package.__path__[0]).glob("*.py"))
    assert not any(
        word in sources
        for word in ("import pickle", "torch.load", "eval(", "exec(", "gather_object", "broadcast_object")
    )
