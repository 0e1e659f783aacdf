"""What goes wrong for users ends in one paragraph that names the place, and leaves nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_run import finish, start, write_tiny_recipe


def fails(folder: Path, *arguments: str, code: int = 2) -> str:
    """The paragraph of a command that must fail."""
    process = start(folder, *arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err[-3000:]
    assert "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained and exported run `tiny`."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_tiny_recipe(folder, steps=2, eval_interval=0)
    for arguments in (["data", "prepare", str(recipe)], ["train", str(recipe)], ["export", "runs/tiny"]):
        finish(folder, *arguments)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["empty.txt"]),
        ("junk.txt", bytes(range(256)) * 40, ["junk.txt"]),
        ("rows.jsonl", b'{"text": "fine, a long enough document to stay"}\n{"text": broken\n', ["rows.jsonl", "2"]),
        ("other.jsonl", b'{"body": "the text stands in another field"}\n', ["other.jsonl", "text"]),
        ("table.parquet", b"PAR1 but not really", ["table.parquet"]),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00", ["cut.jsonl.gz"]),
        ("cut.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", ["cut.jsonl.zst"]),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(name: str, content: bytes, words: list[str], tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    (tmp_path / name).write_bytes(content)
    message = fails(tmp_path, "data", "prepare", str(recipe), "--set", f"data.sources.0.path={tmp_path / name}")
    for word in words:
        assert word in message
    assert not (tmp_path / "runs" / "tiny" / "stages").exists()


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    message = fails(
        tmp_path, "data", "prepare", str(write_tiny_recipe(tmp_path)), "--set", "data.sources.0.path=nowhere"
    )
    assert "nowhere" in message


def test_training_before_the_data_stage_says_what_to_run(tmp_path: Path) -> None:
    assert "anychip data prepare" in fails(tmp_path, "train", str(write_tiny_recipe(tmp_path)))


def test_a_tokenizer_larger_than_the_model_is_refused(trained: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(trained / "runs" / "tiny" / "export", export)
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    process = start(tmp_path, "data", "prepare", str(write_tiny_recipe(tmp_path)), "--set", "model.vocab_size=300",
                    "--set", "data.tokenizer.kind=json", "--set",
                    f"data.tokenizer.path={export / 'tokenizer.json'}")  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "vocab" in err and "Traceback" not in err
    assert config["vocab_size"] == 384


def test_truncated_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(trained / "runs" / "tiny" / "export", export)
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = fails(tmp_path, "generate", str(export), "--prompt", "x")
    assert "model.safetensors" in message and "truncated" in message


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "neither a run directory" in fails(tmp_path, "chat", str(tmp_path))


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(trained / "runs" / "tiny", run)
    shard = next((run / "checkpoints").glob("step-*2/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    message = fails(tmp_path, "generate", str(run), "--prompt", "x", code=3)
    assert shard.name in message


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_said_plainly_and_leaves_no_half_file(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let a test mount a small file system")
    try:
        recipe = write_tiny_recipe(tmp_path)
        process = start(tmp_path, "data", "prepare", str(recipe), "--runs", str(small))
        _, err = process.communicate(timeout=120)
        assert process.returncode not in (0, -9) and "Traceback" not in err and "space" in err.lower()
        assert not (small / "tiny" / "stages" / "data.json").exists()
    finally:
        subprocess.run(["umount", str(small)], check=False)
