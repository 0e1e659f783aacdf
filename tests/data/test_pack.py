"""Packing: any number of processes and any interruption give the same bytes; changed inputs are packed anew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from megatron_format import read
from tiny_corpus import make_recipe, sentence, write_jsonl

from anychip.data import pack
from anychip.data.prepare import prepare_data
from anychip.data.tokenizer import load_tokenizer, train_bpe
from anychip.rundir import RunDirectory


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[list[Path], Path]:
    """Documents as JSON lines with ids, and a tokenizer."""
    texts = [sentence(n, 60 + n % 50) for n in range(400)]
    lines = "".join(json.dumps({"id": f"doc-{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    path = tmp_path / "documents.jsonl"
    path.write_text(lines, encoding="utf-8")
    tokenizer = train_bpe(texts[:50], 320)
    tokenizer.save(tmp_path / "tokenizer")
    return [path], tmp_path / "tokenizer"


def packed_bytes(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + end).read_bytes() for end in (".bin", ".idx", ".documents", ".json")]


def test_processes_do_not_change_a_byte(
    inputs: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_PART_BYTES", 20_000)
    files, tokenizer = inputs
    for workers in (1, 2):
        pack.pack_corpus(files, tmp_path / f"by{workers}", tokenizer, workers)
    one, two = packed_bytes(tmp_path / "by1"), packed_bytes(tmp_path / "by2")
    assert one == two


def test_what_is_packed_is_what_was_written(inputs: tuple[list[Path], Path], tmp_path: Path) -> None:
    files, folder = inputs
    counts = pack.pack_corpus(files, tmp_path / "out", folder, 1)
    tokenizer = load_tokenizer(folder)
    documents, _ = read(tmp_path / "out")
    sequences = [sequence for document in documents for sequence in document]
    assert counts.documents == len(documents) == 400
    assert counts.tokens == sum(len(sequence) for sequence in sequences)
    assert all(sequence[-1] == tokenizer.eos_id for sequence in sequences)
    assert tokenizer.decode(sequences[7][:-1]) == sentence(7, 67)


PROGRAM = """
import sys
from pathlib import Path
from anychip.data import pack
pack._PART_BYTES = 20_000
pack.pack_corpus([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]), 1)
"""


def test_killed_packing_continues_to_the_same_bytes(
    inputs: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_PART_BYTES", 20_000)
    files, tokenizer = inputs
    pack.pack_corpus(files, tmp_path / "whole", tokenizer, 1)
    killed = tmp_path / "killed"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(files[0]), str(killed), str(tokenizer)])
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if any(tmp_path.glob(".killed.parts-*/*.documents")):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.wait()
    pack.pack_corpus(files, killed, tokenizer, 1)
    assert packed_bytes(killed)[:3] == packed_bytes(tmp_path / "whole")[:3]
    assert not list(tmp_path.glob(".killed.parts-*"))


def test_a_changed_corpus_is_prepared_anew_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", [sentence(n) for n in range(30)])
    recipe = make_recipe([{"name": "texts", "path": str(source)}])
    run = RunDirectory(tmp_path / "run")
    prepare_data(recipe, run)
    packed = run.data / "train" / "texts.bin"
    before, written = packed.read_bytes(), packed.stat().st_mtime_ns
    prepare_data(recipe, run)
    assert packed.stat().st_mtime_ns == written
    write_jsonl(source, [sentence(n) for n in range(50, 90)])
    prepare_data(recipe, run)
    assert packed.read_bytes() != before
