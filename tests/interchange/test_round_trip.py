"""Out of a run and back into one: the same bits, in files that other programs open."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    MODEL,
    PUBLISHED_CONFIG,
    make_run,
    published_weights,
    random_weights,
    tiny_recipe,
    tiny_tokenizer,
    write_config,
)
from tokenizers import Tokenizer as Backend
from torch import Tensor

from anychip.errors import InputError, UnfitError
from anychip.families.telechat2 import PublishedTensor, published_tensors
from anychip.files import sha256_file
from anychip.interchange import export as export_module
from anychip.interchange.export import export_run
from anychip.interchange.import_model import import_model
from anychip.interchange.layout import to_logical, to_published
from anychip.interchange.load import load_for_inference
from anychip.interchange.safetensors_file import write_safetensors
from anychip.recipe.schema import ModelConfig
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointStore
from anychip.train.checkpoint.manifest import MANIFEST_NAME

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SCALING = {"base_length": 16, "training_length": 32}


def weight_bytes(export: Path) -> dict[str, Tensor]:
    """All tensors of an export, read by the reference library."""
    return {name: t for file in sorted(export.glob("*.safetensors")) for name, t in load_file(file).items()}


def import_recipe(source: Path, name: str = "again", **changes: Any) -> Any:
    tokenizer = {"kind": "json", "path": str(source / "tokenizer.json")}
    data = {"sources": [{"name": "words", "path": "corpus"}], "tokenizer": tokenizer}
    return tiny_recipe(name, changes.pop("model", None), data=data, **changes)


def test_keys_and_values_interleave_by_head() -> None:
    config = ModelConfig(**{**MODEL, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2})
    (fused,) = [t for t in published_tensors(config) if t.name == "transformer.h.0.self_attention.key_value.weight"]
    keys = torch.arange(4.0)[:, None].expand(4, 8)  # rows 0 1 | 2 3 of heads 0 and 1
    values = keys + 10
    data = to_published(config, fused, [keys, values])
    assert data[:, 0].tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    back = to_logical(config, fused, data)
    assert torch.equal(back["layers.0.self_attn.k_proj.weight"], keys)
    assert torch.equal(back["layers.0.self_attn.v_proj.weight"], values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [10**9, 5_000])
def test_an_export_holds_the_rounded_weights_and_loads_as_they_are(
    dtype: str, shard_bytes: int, tmp_path: Path
) -> None:
    recipe = tiny_recipe(export={"dtype": dtype, "max_shard_bytes": shard_bytes})
    weights = random_weights(recipe.model)
    export = export_run(make_run(tmp_path / "run", recipe, weights))
    found = weight_bytes(export)
    assert set(found) == {tensor.name for tensor in published_tensors(recipe.model)}
    for tensor in published_tensors(recipe.model):
        expected = to_published(recipe.model, tensor, [weights[name] for name in tensor.logical]).to(DTYPES[dtype])
        assert torch.equal(found[tensor.name], expected) and found[tensor.name].dtype == DTYPES[dtype]
    files = list(export.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 10**9)
    if shard_bytes == 5_000:
        index = json.loads((export / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
        assert all(name in load_file(export / file) for name, file in index["weight_map"].items())
    loaded = load_for_inference(export)
    for name, parameter in loaded.decoder.named_parameters():
        assert torch.equal(parameter, weights[name].to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [{}, {"rope_scaling": SCALING}, {"num_key_value_heads": 4}, {"rope_theta": 1e6}])
def test_export_import_export_gives_the_same_bytes(dtype: str, model: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(model=model, export={"dtype": dtype, "max_shard_bytes": 20_000})
    first = export_run(make_run(tmp_path / "run", recipe))
    again = import_recipe(first, model=model, export={"dtype": dtype, "max_shard_bytes": 20_000})
    run = RunDirectory(tmp_path / "again")
    run.write_recipe(again)
    import_model(first, again, run)
    second = export_run(run)
    same = {path.name: sha256_file(path) for path in first.iterdir()}
    for path in second.iterdir():
        if path.name not in ("conversion.json", "README.md"):  # these name the run
            assert sha256_file(path) == same[path.name], path.name
    assert json.loads((run.root / "import.json").read_text())["logit_check"]["passed"] is True


def test_conversion_json_says_what_was_compared_and_digests_every_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    export = export_run(run)
    record = json.loads((export / "conversion.json").read_text())
    manifest = sha256_file(CheckpointStore(run.checkpoints).open(5).path / MANIFEST_NAME)
    assert record["source"] == {"run": "tiny", "stage": "pretrain", "step": 5, "manifest": manifest}
    check = record["logit_check"]
    assert check["passed"] and 0 <= check["relative"] <= check["threshold"] and check["largest_logit"] > 0.1
    assert check["same_top_1"] == 1.0 and check["tokens"] == 64
    names = {path.name for path in export.iterdir()} - {"conversion.json", "README.md"}
    assert record["files"] == {name: sha256_file(export / name) for name in names}
    card = (export / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "step 5" in card and "logit difference" in card


def test_a_step_and_a_stage_can_be_chosen(tmp_path: Path) -> None:
    recipe = tiny_recipe(export={"dtype": "fp32"})
    older, newer = random_weights(recipe.model, 1), random_weights(recipe.model, 2)
    run = make_run(tmp_path / "run", recipe, older, step=5)
    tuned = random_weights(recipe.model, 3)
    for store, step, weights in ((run.checkpoints, 9, newer), (run.sft / "checkpoints", 2, tuned)):
        CheckpointStore(store).save(step, {f"model.{name}": t for name, t in weights.items()}, {})

    def exported(**choice: Any) -> Tensor:
        return weight_bytes(export_run(run, **choice))["transformer.ln_f.weight"]

    assert torch.equal(exported(), tuned["norm.weight"])
    assert torch.equal(exported(stage="pretrain"), newer["norm.weight"])
    assert torch.equal(exported(stage="pretrain", step=5), older["norm.weight"])
    with pytest.raises(InputError, match=r"no checkpoint of step 7.*5, 9"):
        export_run(run, stage="pretrain", step=7)
    with pytest.raises(InputError, match="--stage rlhf is not known"):
        export_run(run, stage="rlhf")


def test_the_tokenizer_opens_elsewhere_and_gives_the_same_ids(tmp_path: Path) -> None:
    export = export_run(make_run(tmp_path / "run"))
    theirs, ours = Backend.from_file(str(export / "tokenizer.json")), load_for_inference(export).tokenizer
    text = "the cat 猫 42\n\tsat"
    assert theirs.encode(text).ids == ours.encode(text) == tiny_tokenizer().encode(text)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 3)


# What is altered in the export, as a function of the tensor that would be right.
DAMAGE = {
    "keys and values swapped": ("key_value.weight", lambda t: t.view(2, 2, 8, 32).flip(1).reshape(t.shape)),
    "one bias lost": ("h.1.mlp.down_proj.bias", torch.zeros_like),
    "one norm lost": ("h.1.post_attention_layernorm.weight", torch.ones_like),
    "a NaN": ("h.0.mlp.up_proj.weight", lambda t: t.index_fill(0, torch.tensor([3]), float("nan"))),
    "an infinity": ("lm_head.weight", lambda t: t.index_fill(0, torch.tensor([3]), float("inf"))),
    "heads in another order": ("query.weight", lambda t: t.view(4, 8, 32).flip(0).reshape(t.shape)),
    "one value off": ("h.0.mlp.gate_proj.weight", lambda t: t.index_fill(0, torch.tensor([0]), 1.0)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_altered_tensor_fails_the_logit_check_and_nothing_is_published(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, alter = DAMAGE[kind]

    def wrong(config: ModelConfig, tensor: PublishedTensor, parts: list[Tensor]) -> Tensor:
        right = to_published(config, tensor, parts)
        return alter(right).contiguous() if tensor.name.endswith(suffix) else right

    run = make_run(tmp_path / "run", tiny_recipe(export={"dtype": "fp32"}))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    monkeypatch.setattr(export_module, "to_published", wrong)
    with pytest.raises(UnfitError, match="logits") as error:
        export_run(run)
    assert error.value.exit_code == 3
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_an_import_that_changes_logits_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = export_run(make_run(tmp_path / "run"))

    def swapped(config: ModelConfig, tensor: PublishedTensor, data: Tensor) -> dict[str, Tensor]:
        parts = to_logical(config, tensor, data)
        return dict(zip(parts, reversed(list(parts.values())), strict=True))

    monkeypatch.setattr("anychip.interchange.layout.to_logical", swapped)
    run = RunDirectory(tmp_path / "again")
    with pytest.raises(UnfitError, match="logits"):
        import_model(source, import_recipe(source), run)
    assert CheckpointStore(run.checkpoints).latest() is None
    assert not run.tokenizer.exists() and not (run.root / "import.json").exists()


def test_weights_of_all_three_kinds_in_one_model_are_imported_exactly(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    weights = published_weights(recipe.model, torch.float32)
    source = tmp_path / "published"
    tiny_tokenizer().save(source)
    write_config(source)
    mixed = {name: weight.to(kinds[number % 3]) for number, (name, weight) in enumerate(weights.items())}
    weight_map = {}
    for number, (name, weight) in enumerate(mixed.items()):
        file = f"model-{number:05d}.safetensors"
        write_safetensors(source / file, [(name, tuple(weight.shape))], weight.dtype, [weight])
        weight_map[name] = file
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    run = RunDirectory(tmp_path / "run")
    import_model(source, import_recipe(source, model={"max_position_embeddings": 64}), run)
    store = CheckpointStore(run.checkpoints)
    info = store.open(0)
    tensors = dict(store.read(info))
    for tensor in published_tensors(recipe.model):
        for name, part in to_logical(recipe.model, tensor, mixed[tensor.name]).items():
            assert torch.equal(tensors[f"model.{name}"], part.float())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"hidden_size": 64}, r"hidden_size 32 \(recipe: 64\)"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"rope_scaling": SCALING}, "rope_scaling"),
        ({"max_position_embeddings": 4096}, "rope_scaling"),  # the export scales beyond its 128 tokens
    ],
)
def test_a_recipe_of_another_model_is_refused_by_field(model: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = export_run(make_run(tmp_path / "run"))
    run = RunDirectory(tmp_path / "again")
    with pytest.raises(InputError, match=words):
        import_model(source, import_recipe(source, model=model), run)
    assert not run.root.exists()


def test_an_import_needs_the_models_own_tokenizer(tmp_path: Path) -> None:
    source, run = export_run(make_run(tmp_path / "run")), RunDirectory(tmp_path / "again")
    with pytest.raises(InputError, match=r"--set data\.tokenizer\.kind=json") as error:
        import_model(source, tiny_recipe("again"), run)
    assert str(source / "tokenizer.json") in error.value.paragraph
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + "\n")
    wrong = import_recipe(other)
    with pytest.raises(InputError, match="another"):
        import_model(source, wrong, run)
    assert not run.root.exists()


def test_an_import_refuses_to_overwrite_a_checkpoint(tmp_path: Path) -> None:
    source, run = export_run(make_run(tmp_path / "run")), RunDirectory(tmp_path / "again")
    import_model(source, import_recipe(source), run)
    with pytest.raises(InputError, match="not overwritten"):
        import_model(source, import_recipe(source), run)


def test_a_disk_that_fills_during_an_import_is_said_and_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = export_run(make_run(tmp_path / "run")), RunDirectory(tmp_path / "again")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("anychip.interchange.import_model.write_json", full)
    with pytest.raises(InputError, match="No space left"):
        import_model(source, import_recipe(source), run)
    assert CheckpointStore(run.checkpoints).steps() == []


def test_a_tokenizer_larger_than_its_model_is_refused_both_ways(tmp_path: Path) -> None:
    recipe = tiny_recipe(model={"vocab_size": 300})
    run = make_run(tmp_path / "run", recipe)
    with pytest.raises(InputError, match=r"\d+ pieces, its model only 300"):
        export_run(run)
    assert not run.export.exists()
    source = tmp_path / "published"
    tiny_tokenizer().save(source)
    write_config(source, vocab_size=300)
    weights = published_weights(recipe.model)
    shapes = [(name, tuple(weight.shape)) for name, weight in weights.items()]
    write_safetensors(source / "model.safetensors", shapes, torch.bfloat16, weights.values())
    for use in (lambda: load_for_inference(source), lambda: import_model(source, recipe, RunDirectory(tmp_path / "x"))):
        with pytest.raises(InputError, match=r"\d+ pieces, its model only 300"):
            use()


def test_published_config_is_what_an_export_writes(tmp_path: Path) -> None:
    raw = json.loads((export_run(make_run(tmp_path / "run")) / "config.json").read_text())
    assert {name: raw[name] for name in PUBLISHED_CONFIG} == PUBLISHED_CONFIG
    assert raw["torch_dtype"] == "bfloat16" and raw["eos_token_id"] == 2
