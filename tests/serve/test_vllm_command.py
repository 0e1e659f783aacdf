"""What vLLM is started with, as a program of that name sees it, and what it cannot be given. vLLM is not run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anychip.errors import InputError
from anychip.serve.vllm import serve_by_vllm

KEY = "a-key-of-sixteen-or-more"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export of the kind that needs no remote code, and on PATH a vllm that says what it was given."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$VLLM_API_KEY" "$@"\n')
    program.chmod(0o755)
    return tmp_path / "model"


def started(export: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anychip", "serve", str(export), "--engine", "vllm", *words]
    path = f"{export.parent}:{os.environ['PATH']}"
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment, "PATH": path}, timeout=120
    )


def test_the_command_line_is_that_of_vllm(export: Path) -> None:
    run = started(export, "--port", "9")
    key, *words = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert key == "" and words[:2] == ["serve", str(export)]
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    assert flags == {
        "--host": "127.0.0.1", "--port": "9", "--served-model-name": "model", "--allowed-origins": "[]",
        "--dtype": "auto",
    }  # fmt: skip


def test_every_option_that_it_has_is_handed_on(export: Path) -> None:
    words = "--host 0.0.0.0 --name m --context-length 99 --max-batch 7 --weights bf16 --temperature 0.5 --thinking"
    words += " --allow-origin https://a.example -- --tensor-parallel-size 8 --enable-auto-tool-choice"
    run = started(export, *words.split(), ANYCHIP_API_KEYS=KEY)
    assert run.returncode == 0, run.stderr
    assert "below /v1 alone" in run.stderr
    key, _, _, *given = run.stdout.splitlines()
    assert key == KEY and KEY not in given, "the list of processes does not show it"
    assert given[-3:] == ["--tensor-parallel-size", "8", "--enable-auto-tool-choice"]
    flags = dict(zip(given[:-3:2], given[1:-3:2], strict=True))
    assert json.loads(flags.pop("--override-generation-config")) == {"temperature": 0.5}
    assert json.loads(flags.pop("--allowed-origins")) == ["https://a.example"]
    assert flags == {
        "--host": "0.0.0.0", "--port": "8000", "--served-model-name": "m", "--dtype": "bfloat16",
        "--max-model-len": "99", "--max-num-seqs": "7", "--reasoning-parser": "deepseek_r1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--queue", "3"], "--queue is for anychip's own engine"),
        (["--allow-host", "a.example"], "--allow-host is for anychip's own engine"),
    ],
)
def test_what_it_has_not_is_refused(export: Path, words: list[str], says: str) -> None:
    run = started(export, *words)
    assert run.returncode == 2 and says in " ".join(run.stderr.split())


def test_what_it_cannot_load_or_take_is_refused(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not an exported model"):
        serve_by_vllm(export.parent)
    with pytest.raises(InputError, match="--weights int8"):
        serve_by_vllm(export, weights="int8")
    monkeypatch.setenv("ANYCHIP_API_KEYS", f"{KEY},{KEY}-2")
    with pytest.raises(InputError, match="more than one API key"):
        serve_by_vllm(export)
    monkeypatch.delenv("ANYCHIP_API_KEYS")
    monkeypatch.setenv("PATH", str(export))
    with pytest.raises(InputError, match="vLLM is not installed here"):
        serve_by_vllm(export)
    (export / "config.json").write_text('{"model_type": "telechat"}')
    with pytest.raises(InputError, match="which vLLM reads only by code"):
        serve_by_vllm(export)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (export / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(InputError, match="several processes of torchrun"):
        serve_by_vllm(export)


def test_words_behind_dashes_are_for_vllm_alone(export: Path) -> None:
    command = [sys.executable, "-m", "anychip", "serve", str(export), "--", "--tensor-parallel-size", "8"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "does not know --tensor-parallel-size 8" in " ".join(run.stderr.split())
