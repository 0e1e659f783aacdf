from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import megatron_format
import pytest
from tiny_corpus import sentence

from anychip.data import pack
from anychip.data.documents import DocumentTable
from anychip.data.pack import counts_path, documents_path, pack_corpus, read_counts
from anychip.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from anychip.files import sha256_file

SUFFIXES = (".bin", ".idx", ".blocks", ".documents", ".json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and three files of documents."""
    root = tmp_path_factory.mktemp("pack")
    train_bpe((sentence(n) for n in range(40)), 300).save(root / "tokenizer")
    for number in range(3):
        lines = [
            json.dumps({"id": f"s:{number}#{n}", "source": "s", "text": sentence(n * 3 + number, 10 + n % 50) + " é"})
            for n in range(120)
        ]
        (root / f"{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_PART_BYTES", 2000)


def inputs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def files(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in SUFFIXES]


def test_packed_corpus_holds_every_document_and_its_end(folder: Path, tmp_path: Path, small_parts: None) -> None:
    prefix = tmp_path / "s"
    counts = pack_corpus(inputs(folder), prefix, folder / "tokenizer", 1)
    tokenizer: Tokenizer = load_tokenizer(folder / "tokenizer")
    records = [json.loads(line) for path in inputs(folder) for line in path.read_text(encoding="utf-8").splitlines()]
    packed, code = megatron_format.read(prefix)
    assert code == 8
    assert packed == [[[*tokenizer.encode(record["text"]), tokenizer.eos_id]] for record in records]
    table = DocumentTable(documents_path(prefix))
    assert [table.id(number) for number in range(len(table))] == [record["id"] for record in records]
    assert table.text_bytes.tolist() == [len(record["text"].encode()) for record in records]
    assert counts == read_counts(prefix)
    assert counts.documents == len(records)
    assert counts.tokens == sum(len(document[0]) for document in packed)
    assert counts.text_bytes == sum(len(record["text"].encode()) for record in records)
    assert counts.bin_sha256 == sha256_file(tmp_path / "s.bin")
    assert counts.idx_sha256 == sha256_file(tmp_path / "s.idx")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"s{suffix}" for suffix in SUFFIXES)


def test_processes_and_part_sizes_do_not_change_a_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_corpus(inputs(folder), tmp_path / "whole", folder / "tokenizer", 1)
    monkeypatch.setattr(pack, "_PART_BYTES", 10_000)
    pack_corpus(inputs(folder), tmp_path / "two", folder / "tokenizer", 2)
    assert files(tmp_path / "two") == files(tmp_path / "whole")


def test_no_documents_give_an_empty_corpus(folder: Path, tmp_path: Path) -> None:
    counts = pack_corpus([], tmp_path / "none", folder / "tokenizer", 1)
    assert (counts.documents, counts.tokens) == (0, 0)
    assert (tmp_path / "none.bin").read_bytes() == b""


def _pack_slowly(folder: Path, prefix: Path) -> None:
    """In a process of its own, to be killed: small parts, each followed by a pause."""
    pack._PART_BYTES = 2000  # type: ignore[attr-defined]
    write = pack.write_document_table

    def write_and_rest(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        time.sleep(0.003)

    pack.write_document_table = write_and_rest
    pack_corpus(inputs(folder), prefix, folder / "tokenizer", 1)


def test_kill_at_random_moments_then_resume_gives_the_same_bytes(
    folder: Path, tmp_path: Path, small_parts: None
) -> None:
    pack_corpus(inputs(folder), tmp_path / "whole", folder / "tokenizer", 1)
    prefix = tmp_path / "killed"
    context = multiprocessing.get_context("spawn")
    generator = random.Random(5)
    seen_parts = []
    for _ in range(4):
        process = context.Process(target=_pack_slowly, args=(folder, prefix))
        process.start()
        before = len(list(tmp_path.glob(".killed.parts-*/*.documents")))
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if len(list(tmp_path.glob(".killed.parts-*/*.documents"))) > before:
                break
            time.sleep(0.001)
        time.sleep(generator.random() * 0.02)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        seen_parts.append(len(list(tmp_path.glob(".killed.parts-*/*.documents"))))
        assert not counts_path(prefix).exists(), "nothing is published before the end"
    assert seen_parts == sorted(seen_parts)
    assert seen_parts[0] > 0
    taken = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".killed.parts-*/*.documents")}
    write, written = pack._pack_part, []
    try:
        pack._pack_part = lambda *arguments: written.append(arguments[2]) or write(*arguments)  # type: ignore
        pack_corpus(inputs(folder), prefix, folder / "tokenizer", 1)
    finally:
        pack._pack_part = write
    assert written, "there was something left to do"
    assert not {documents_path(part) for part in written} & taken.keys(), "finished parts are taken as they are"
    assert files(prefix) == files(tmp_path / "whole")


def test_other_inputs_do_not_reuse_old_parts(folder: Path, tmp_path: Path, small_parts: None) -> None:
    prefix = tmp_path / "s"
    pack_corpus(inputs(folder)[:1], prefix, folder / "tokenizer", 1)
    pack_corpus(inputs(folder)[1:], prefix, folder / "tokenizer", 1)
    pack_corpus(inputs(folder)[1:], tmp_path / "other", folder / "tokenizer", 1)
    assert files(prefix) == files(tmp_path / "other")
