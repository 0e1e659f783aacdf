"""Merged models against averages computed here, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_run, random_weights, tiny_recipe

from anychip.data.tokenizer import train_bpe
from anychip.errors import InputError
from anychip.files import sha256_file
from anychip.interchange.export import export_run
from anychip.interchange.load import load_for_inference
from anychip.interchange.merge import merge_models


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("merge")
    config = tiny_recipe().model
    return [
        export_run(make_run(folder / name, weights=random_weights(config, seed)), out=folder / f"{name}-export")
        for seed, name in enumerate(("one", "two"))
    ]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("given", [None, [3.0, 1.0], [0.1, 0.9]])
def test_weights_are_averaged_and_rounded_once(exports: list[Path], given: list[float] | None, tmp_path: Path) -> None:
    merged = weights(merge_models(exports, given, tmp_path / "merged"))
    one, two = map(weights, exports)
    first = 0.5 if given is None else given[0] / sum(given)
    second = 0.5 if given is None else given[1] / sum(given)
    assert merged.keys() == one.keys() == two.keys()
    for name, tensor in merged.items():
        expected = (one[name].double() * first + two[name].double() * second).to(one[name].dtype)
        assert torch.equal(tensor, expected), name
    assert any((one[name] != two[name]).any() for name in one)


@pytest.mark.parametrize("place", [0, 1])
def test_all_weight_on_one_model_gives_its_bits(exports: list[Path], place: int, tmp_path: Path) -> None:
    merged = weights(merge_models(exports, [1.0 - place, float(place)], tmp_path / "merged"))
    expected = weights(exports[place])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_a_merge_is_a_model_that_knows_what_it_is_made_of(exports: list[Path], tmp_path: Path) -> None:
    out = merge_models(exports, [1, 3], tmp_path / "merged")
    assert load_for_inference(out).config == load_for_inference(exports[0]).config
    record = json.loads((out / "merge.json").read_text())
    assert [(model["path"], model["share"]) for model in record["models"]] == [
        (exports[0].name, 0.25), (exports[1].name, 0.75),
    ]  # fmt: skip
    for model, path in zip(record["models"], exports, strict=True):
        assert model["files"]["model.safetensors"] == sha256_file(path / "model.safetensors")
        assert model["source"]["stage"] == "pretrain"
    assert record["files"]["model.safetensors"] == sha256_file(out / "model.safetensors")
    again = merge_models([out, exports[0]], None, tmp_path / "again")
    assert json.loads((again / "merge.json").read_text())["models"][0]["models"] == record["models"]


@pytest.mark.parametrize("given", [[1.0], [1.0, -0.5], [0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0, 1.0]])
def test_weights_that_make_no_average_are_refused(exports: list[Path], given: list[float], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights"):
        merge_models(exports, given, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_models_that_differ_and_targets_that_exist_are_refused(exports: list[Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "other", tiny_recipe(model={"rms_norm_eps": 1e-3}))
    other = export_run(run, out=tmp_path / "other-export")
    with pytest.raises(InputError, match="rms_norm_eps"):
        merge_models([exports[0], other], None, tmp_path / "merged")
    run = make_run(tmp_path / "spoken", tokenizer=train_bpe(["other words " * 20], vocab_size=300))
    with pytest.raises(InputError, match="another tokenizer"):
        merge_models([exports[0], export_run(run, out=tmp_path / "spoken-export")], None, tmp_path / "merged")
    with pytest.raises(InputError, match="exists"):
        merge_models(exports, None, exports[0])
    with pytest.raises(InputError):
        merge_models([tmp_path / "nothing"], None, tmp_path / "merged")
