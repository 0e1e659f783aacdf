"""Pretrained, tuned with adapters, tuned on preferences: what each stage leaves, and that it continues bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import write_tiny_recipe

from anychip.errors import InputError
from anychip.families.telechat2 import published_tensors
from anychip.interchange.adapter import export_adapter
from anychip.interchange.layout import to_published
from anychip.interchange.load import load_for_inference
from anychip.rundir import RunDirectory
from anychip.stages import open_run, run_stage
from anychip.train.checkpoint import CheckpointStore
from anychip.train.loop import Stopped
from anychip.tune.sft import SftData

LORA = ["tune.sft.lora.rank=2", "tune.sft.lora.alpha=6"]


def weights(checkpoints: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(checkpoints)
    newest = store.latest()
    assert newest is not None
    return {name: tensor for name, tensor in store.read(newest) if name.startswith("model.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained run, with dialogs and pairs beside it."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "d.jsonl").write_text(
        "\n".join(json.dumps({"instruction": f"what is {n}?", "output": f"the number {n}"}) for n in range(24))
    )
    (folder / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"what is {n}?", "chosen": f"it is {n}", "rejected": "no"}) for n in range(24))
    )
    opened = open_run(write_tiny_recipe(folder), overrides(folder), folder / "runs")
    run_stage("data", *opened)
    run_stage("train", *opened)
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    sft = f"{{sources: [{{path: {folder}/d.jsonl}}], steps: 7, seq_length: 48, packing: true}}"
    dpo = f"{{sources: [{{path: {folder}/p.jsonl}}], steps: 6, seq_length: 48}}"
    sft_optimizer = "tune.sft.optimizer={lr: 1.0e-2, weight_decay: 0.0}"
    dpo_optimizer = "tune.dpo.optimizer={lr: 1.0e-3, weight_decay: 0.0, schedule: {warmup_steps: 0}}"
    return [f"tune.sft={sft}", sft_optimizer, f"tune.dpo={dpo}", dpo_optimizer, "model.hidden_dropout=0.1", *more]


def opened(folder: Path, name: str, *more: str):  # type: ignore[no-untyped-def]
    """The pretrained run under another name."""
    if not (folder / "runs" / name).exists():
        shutil.copytree(folder / "runs" / "tiny", folder / "runs" / name)
    return open_run(folder / "tiny.yaml", overrides(folder, f"name={name}", *more), folder / "runs")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> RunDirectory:
    recipe, run = opened(folder, "tuned", *LORA)
    run_stage("sft", recipe, run)
    run_stage("dpo", recipe, run)
    return run


def test_merged_weights_are_the_start_and_the_product_of_each_adapter(tuned: RunDirectory) -> None:
    base, whole = weights(tuned.checkpoints), weights(tuned.sft / "checkpoints")
    adapters = weights(tuned.sft / "adapter" / "checkpoints")
    assert all(".adapter." in name for name in adapters) and base.keys() == whole.keys()
    changed = 0
    for name, start in base.items():
        module = name.removesuffix(".weight")
        if f"{module}.adapter.a" in adapters:
            product = 3.0 * adapters[f"{module}.adapter.b"] @ adapters[f"{module}.adapter.a"]
            torch.testing.assert_close(whole[name], start + product, rtol=1e-5, atol=1e-6)
            changed += bool((whole[name] != start).any())
        else:
            assert torch.equal(whole[name], start), name
    assert changed == 2 * 7


def test_the_adapter_for_peft_is_the_same_change_of_the_published_matrices(tuned: RunDirectory) -> None:
    """By PEFT's rule, on the fused matrices: W + lora_alpha / r * B A, with rank and alpha by module."""
    target = export_adapter(tuned)
    config = json.loads((target / "adapter_config.json").read_text())
    tensors, model = load_file(target / "adapter_model.safetensors"), tuned.read_recipe().model
    base, whole = weights(tuned.checkpoints), weights(tuned.sft / "checkpoints")
    assert config["peft_type"] == "LORA" and config["rank_pattern"] == {"key_value": 4}
    assert set(config["target_modules"]) == {"query", "key_value", "dense", "gate_proj", "up_proj", "down_proj"}
    adapted = 0
    for tensor in published_tensors(model):
        before, after = (
            to_published(model, tensor, [state[f"model.{name}"] for name in tensor.logical]) for state in (base, whole)
        )
        module = tensor.name.removesuffix(".weight")
        a = tensors.get(f"base_model.model.{module}.lora_A.weight")
        if a is None:
            assert torch.equal(before, after)
            continue
        b, kind = tensors[f"base_model.model.{module}.lora_B.weight"], module.rpartition(".")[2]
        rank = config["rank_pattern"].get(kind, config["r"])
        scale = config["alpha_pattern"].get(kind, config["lora_alpha"]) / rank
        assert a.shape == (rank, before.shape[1]) and b.shape == (before.shape[0], rank)
        torch.testing.assert_close(before + scale * b @ a, after, rtol=1e-5, atol=1e-6)
        adapted += 1
    assert adapted == 2 * 6 and len(tensors) == 2 * adapted
    assert export_adapter(tuned) == target  # over itself
    (target / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not an adapter"):
        export_adapter(tuned)


def test_preferences_are_learned_from_the_tuned_weights(tuned: RunDirectory) -> None:
    """The first loss is ln 2 because DPO drops nothing, whatever tuning on dialogs does."""
    rows = [json.loads(line) for line in (tuned.dpo / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(0.6931472, rel=1e-6) and losses[-1] < 0.6
    assert (tuned.dpo / "reference.safetensors").is_file()
    assert "dpo, step 6" in load_for_inference(tuned.root).source


def test_a_reference_computed_on_the_fly_gives_the_same_bits(folder: Path, tuned: RunDirectory) -> None:
    recipe, run = opened(folder, "on-the-fly", *LORA, "tune.dpo.reference=on_the_fly")
    shutil.copytree(tuned.sft, run.sft, dirs_exist_ok=True)
    shutil.copy(tuned.stage_marker("sft"), run.stage_marker("sft"))
    run_stage("dpo", recipe, run)
    expected = weights(tuned.dpo / "checkpoints")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run.dpo / "checkpoints").items())


def test_tuning_that_was_stopped_continues_bit_for_bit(
    folder: Path, tuned: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = opened(folder, "stopped", *LORA)
    batch = SftData.batch

    def stopping(self: SftData, step: int):  # type: ignore[no-untyped-def]
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(SftData, "batch", stopping)
        run_stage("sft", recipe, run)
    assert not (run.sft / "checkpoints").exists()
    run_stage("sft", recipe, run)
    expected = weights(tuned.sft / "checkpoints")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run.sft / "checkpoints").items())


def test_a_run_without_adapters_has_none_to_export(folder: Path) -> None:
    with pytest.raises(InputError, match="no adapter"):
        export_adapter(RunDirectory(folder / "runs" / "tiny"))
