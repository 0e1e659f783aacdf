"""Published directories that are damaged, incomplete, or made to harm: one paragraph that names file and cause."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import published_weights, tiny_recipe, tiny_tokenizer, write_config

from anychip.errors import InputError
from anychip.interchange.load import load_for_inference
from anychip.interchange.published import PublishedDirectory
from anychip.interchange.safetensors_file import SafetensorsFile

WEIGHTS = published_weights(tiny_recipe().model)
W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete published directory."""
    tiny_tokenizer().save(tmp_path / "model")
    write_config(tmp_path / "model")
    save_file(WEIGHTS, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def refused(folder: Path, words: str, file: str = "") -> None:
    with pytest.raises(InputError, match=words) as error:
        load_for_inference(folder)
    paragraph = error.value.paragraph
    assert paragraph.startswith(str(folder / file))
    assert paragraph.isprintable() and len(paragraph) < 600 and error.value.exit_code == 2


def file_of(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HOSTILE_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"1234567", "truncated"),
    "header beyond the end": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "header of 2 ** 63": (struct.pack("<Q", 1 << 63) + b"{}", "truncated"),
    "not JSON": (file_of(b"{{{{"), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (file_of(b"[" * 100_000), "not valid JSON"),
    "a list": (file_of([]), "not a JSON object"),
    "a name twice": (file_of(b'{"w": %b, "w": %b}' % ((json.dumps(W).encode(),) * 2)), "twice"),
    "no offsets": (file_of({"w": {"dtype": "F32", "shape": [2]}}), "wrongly"),
    "no object": (file_of({"w": 3}), "wrongly"),
    "unknown dtype": (file_of({"w": {**W, "dtype": "F8_E4M3"}}), "F8_E4M3"),
    "dtype of a list": (file_of({"w": {**W, "dtype": ["F32"]}}), "not supported"),
    "negative offset": (file_of({"w": {**W, "data_offsets": [-8, 0]}}), "within"),
    "offsets backwards": (file_of({"w": {**W, "data_offsets": [8, 0]}}), "within"),
    "offset of 4000 digits": (file_of({"w": {**W, "data_offsets": [0, int("9" * 4000)]}}), "within"),
    "three offsets": (file_of({"w": {**W, "data_offsets": [0, 4, 8]}}), "wrongly"),
    "offsets of bools": (file_of({"w": {**W, "data_offsets": [False, True]}}), "wrongly"),
    "end beyond the file": (file_of({"w": {**W, "shape": [4], "data_offsets": [0, 16]}}), "truncated"),
    "shape needs more": (file_of({"w": {**W, "shape": [3]}}), "needs 12"),
    "negative shape": (file_of({"w": {**W, "shape": [-2]}}), "impossible shape"),
    "shape that overflows": (file_of({"w": {**W, "shape": [1 << 39, 1 << 39]}}), "impossible shape"),
    "shape of floats": (file_of({"w": {**W, "shape": [2.0]}}), "impossible shape"),
    "a hundred dimensions": (file_of({"w": {**W, "shape": [1] * 100}}), "impossible shape"),
    "overlap": (file_of({"a": W, "b": W}), "gap or an overlap"),
    "gap": (file_of({"a": W, "b": {**W, "data_offsets": [12, 20]}}, bytes(20)), "gap or an overlap"),
    "gap at the start": (file_of({"a": {**W, "data_offsets": [4, 12]}}, bytes(12)), "gap or an overlap"),
    "bytes behind": (file_of({"a": W}, bytes(12)), "4 bytes that no tensor explains"),
    "control characters in a name": (file_of({"\x1b[2J\ud800": {**W, "dtype": "?"}}), r"\\x1b\[2J\\ud800"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_a_hostile_safetensors_file_is_refused(kind: str, folder: Path) -> None:
    content, words = HOSTILE_FILES[kind]
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, words, "model.safetensors")


def test_a_huge_header_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as handle:
        handle.write(struct.pack("<Q", 200_000_000))
        handle.truncate(300_000_000)  # sparse
    refused(folder, "above the limit", "model.safetensors")


def test_what_the_reader_accepts_it_reads_as_the_reference_library(folder: Path) -> None:
    file = SafetensorsFile(folder / "model.safetensors")
    assert {name: entry.shape for name, entry in file.entries.items()} == {
        n: tuple(t.shape) for n, t in WEIGHTS.items()
    }
    directory = PublishedDirectory(folder)
    assert all(torch.equal(directory.read(name), weight) for name, weight in WEIGHTS.items())


def lose(folder: Path) -> None:
    save_file({n: t for n, t in WEIGHTS.items() if n != "transformer.ln_f.weight"}, folder / "model.safetensors")


def add(folder: Path) -> None:
    save_file({**WEIGHTS, "transformer.h.7.mlp.\x1bexpert": torch.zeros(2)}, folder / "model.safetensors")


def reshape(folder: Path) -> None:
    save_file({**WEIGHTS, "lm_head.weight": torch.zeros(32, 320)}, folder / "model.safetensors")


def integers(folder: Path) -> None:
    norm = torch.ones(32, dtype=torch.int8)
    save_file({**WEIGHTS, "transformer.ln_f.weight": norm}, folder / "model.safetensors")


def doubles(folder: Path) -> None:
    norm = torch.ones(32, dtype=torch.float64)
    save_file({**WEIGHTS, "transformer.ln_f.weight": norm}, folder / "model.safetensors")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose, "lacks transformer.ln_f.weight"),
        (add, r"has 'transformer\.h\.7\.mlp\.\\x1bexpert', which"),
        (reshape, r"lm_head\.weight with shape \[32, 320\]; config.json asks for \[320, 32\]"),
        (integers, "torch.int8"),
        (doubles, "torch.float64"),
        (no_weights, "holds no model.safetensors"),
    ],
)
def test_tensors_must_be_those_of_the_configuration(damage: Callable[[Path], None], words: str, folder: Path) -> None:
    damage(folder)
    refused(folder, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 3}, "lacks transformer.h.2.input_layernorm.weight, .* and 7 more"),
        ({"n_layer": 1}, "has transformer.h.1"),
        ({"vocab_size": 321}, r"shape \[320, 32\]; config.json asks for \[321, 32\]"),
        ({"ffn_hidden_size": 64}, "gate_proj"),
        ({"num_key_value_heads": 4}, "key_value"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"num_experts": 8}, "experts"),
        ({"n_layer": 1 << 39}, "layers"),
        ({"hidden_size": 30}, "multiple"),
    ],
)
def test_another_configuration_is_refused(changes: dict[str, Any], words: str, folder: Path) -> None:
    write_config(folder, **changes)
    refused(folder, words)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000, b'"text"'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_none_is_refused(name: str, text: bytes, folder: Path) -> None:
    (folder / name).write_bytes(text)
    refused(folder, "JSON", name)


def test_sampling_values_out_of_range_are_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": -1, "do_sample": true}')
    refused(folder, "out of range", "generation_config.json")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", "a\0b", 7, None, ["x"], "\x1b"],
)
def test_an_index_cannot_lead_out_of_its_directory(name: Any, folder: Path) -> None:
    save_file(WEIGHTS, folder.parent / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, name)}))
    with pytest.raises(InputError, match=r"not beside it|No such file") as error:
        PublishedDirectory(folder)
    assert error.value.paragraph.startswith(str(folder))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}])
def test_an_index_without_a_map_is_refused(index: Any, folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "weight_map", INDEX)


def test_a_missing_shard_and_a_tensor_in_two_shards_are_refused(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, "model-2.safetensors")}))
    refused(folder, "No such file", "model-2.safetensors")
    (folder / "model-2.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    weight_map = dict.fromkeys(WEIGHTS, "model-2.safetensors") | {"lm_head.weight": "model.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, r"which model-2\.safetensors holds too", "model.safetensors")


def test_links_are_followed_as_a_cache_of_snapshots_needs_them(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    folder.rename(blobs)
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..") / "blobs" / blob.name)
    assert load_for_inference(snapshot).config.vocab_size == 320


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.timeout(20)
def test_links_to_devices_and_pipes_are_refused_without_waiting(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / "pipe")
    for target in ("/dev/zero", folder / "pipe"):
        (folder / name).symlink_to(target)
        with pytest.raises(InputError):
            PublishedDirectory(folder)
        (folder / name).unlink()


def test_eps_1e_8_is_warned_about_when_a_model_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(folder, layer_norm_epsilon=1e-8)
    assert load_for_inference(folder).config.rms_norm_eps == 1e-8
    assert "1e-05" in capsys.readouterr().err


def test_paths_that_are_no_model_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "neither a run directory")
    refused(tmp_path / "nothing", "not a directory")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a directory")
