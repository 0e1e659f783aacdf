"""Damage at random: a file is read or refused, and nothing else ever happens."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_models import PUBLISHED_CONFIG, published_weights, tiny_recipe

from anychip.errors import InputError
from anychip.families.telechat2 import config_from_json
from anychip.interchange.published import PublishedDirectory
from anychip.interchange.safetensors_file import SafetensorsFile
from anychip.interchange.source import read_tensor
from anychip.interchange.torch_bin import TorchBinFile

pytestmark = pytest.mark.timeout(120)
STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1.0).half()}
FLIPS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6)


def torch_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(STATE, Path(folder) / "x.bin")
        return (Path(folder) / "x.bin").read_bytes()


SAFETENSORS, TORCH_BIN = save(STATE), torch_bytes()
CONFIG = json.dumps(PUBLISHED_CONFIG).encode()


def damaged(content: bytes, flips: list[tuple[int, int]], cut: int | None, extra: bytes) -> bytes:
    data = bytearray(content)
    for position, value in flips:
        data[position % len(data)] = value
    return bytes(data[: len(data) if cut is None else cut % (len(data) + 1)]) + extra


def read_or_refuse(opener: Any, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(content)
        try:
            file = opener(path)
            for name, entry in file.entries.items():
                assert read_tensor(file, name).shape == entry.shape
        except InputError as error:
            assert str(path) in error.paragraph and error.paragraph.isprintable()


@settings(max_examples=400, deadline=None)
@given(FLIPS, st.none() | st.integers(0, 1 << 20), st.binary(max_size=8))
def test_safetensors(flips: list[tuple[int, int]], cut: int | None, extra: bytes) -> None:
    read_or_refuse(SafetensorsFile, damaged(SAFETENSORS, flips, cut, extra))


@settings(max_examples=400, deadline=None)
@given(FLIPS, st.none() | st.integers(0, 1 << 20), st.binary(max_size=8))
def test_torch_bin(flips: list[tuple[int, int]], cut: int | None, extra: bytes) -> None:
    read_or_refuse(TorchBinFile, damaged(TORCH_BIN, flips, cut, extra))


OPCODES = st.sampled_from([bytes([code]) for code in b"\x80\x95}()]Nqhr\x94cQRtu s\x85\x86\x87bK\x8aX\x8c\x93.0"])


@settings(max_examples=400, deadline=None)
@given(st.lists(OPCODES | st.binary(max_size=3), max_size=60))
def test_torch_bin_with_another_program(pieces: list[bytes]) -> None:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"".join(pieces) + b".")
        archive.writestr("archive/data/0", bytes(16))
    read_or_refuse(TorchBinFile, buffer.getvalue())


@settings(max_examples=300, deadline=None)
@given(FLIPS, st.none() | st.integers(0, 1 << 20), st.binary(max_size=8))
def test_a_damaged_config(flips: list[tuple[int, int]], cut: int | None, extra: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(damaged(CONFIG, flips, cut, extra))
        (Path(folder) / "model.safetensors").write_bytes(WEIGHTS)
        try:
            PublishedDirectory(Path(folder))
        except InputError as error:
            assert folder in error.paragraph and error.paragraph.isprintable()


WEIGHTS = save(published_weights(tiny_recipe().model))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = [*PUBLISHED_CONFIG, "rope_scaling", "rope_theta", "max_position_embeddings", "initializer_range", "num_experts"]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_a_config_with_other_values(changes: dict[str, Any]) -> None:
    try:
        config_from_json({**PUBLISHED_CONFIG, **changes}, "config.json")
    except InputError as error:
        assert error.paragraph.startswith("config.json: ") and error.paragraph.isprintable()
