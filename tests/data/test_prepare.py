from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import make_recipe, sentence, write_jsonl

from anychip.data import pipeline, prepare
from anychip.data.corpora import read_summary
from anychip.data.prepare import prepare_data
from anychip.errors import InputError
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", [sentence(n) for n in range(30)])


@pytest.fixture
def recipe(corpus: Path) -> Recipe:
    return make_recipe([{"name": "s", "path": str(corpus)}])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which steps did their work."""
    done: list[str] = []

    def noting(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            done.append(name)
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, wrapped)

    noting(pipeline, "clean_corpus")
    noting(prepare, "train_bpe")
    noting(prepare, "pack_corpus")
    return done


def test_summary_has_counts_and_digests(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    summary = prepare_data(recipe, run)
    kept = read_summary(run)
    assert {key: summary[key] for key in kept} == kept
    train, validation = kept["sources"]["s"]["train"], kept["sources"]["s"]["validation"]
    assert train["documents"] + validation["documents"] == kept["documents"]["kept"] == 30
    assert train["text_bytes"] + validation["text_bytes"] == sum(len(sentence(n)) for n in range(30))
    assert kept["tokenizer"]["vocab_size"] == 300
    assert len(train["bin_sha256"]) == 64
    assert set(summary["seconds"]) == {"documents", "tokenizer", "packing"}
    assert not (run.data / "work").exists()


def test_steps_are_done_again_only_when_their_inputs_change(
    recipe: Recipe, corpus: Path, tmp_path: Path, calls: list[str]
) -> None:
    run = RunDirectory(tmp_path / "run")

    def done(recipe: Recipe) -> set[str]:
        calls.clear()
        prepare_data(recipe, run)
        return set(calls)

    everything = {"clean_corpus", "train_bpe", "pack_corpus"}
    assert done(recipe) == everything
    assert done(recipe) == set()
    source = {"name": "s", "path": str(corpus)}
    assert done(make_recipe([{**source, "weight": 2.0}], training={"steps": 9})) == set()
    assert done(make_recipe([source], data={"tokenizer": {"vocab_size": 290}})) == {"train_bpe", "pack_corpus"}
    assert done(make_recipe([source], data={"dedup": {"enabled": False}})) == everything
    write_jsonl(corpus, [sentence(n) for n in range(40)])
    assert done(recipe) == everything
    for kind in ("bin", "idx", "blocks", "documents"):
        before = (run.data / "train" / f"s.{kind}").read_bytes()
        (run.data / "train" / f"s.{kind}").unlink()
        assert not prepare.is_there(recipe, run)
        assert done(recipe) == {"pack_corpus"}
        assert (run.data / "train" / f"s.{kind}").read_bytes() == before and prepare.is_there(recipe, run)


def test_a_folder_of_text_and_a_source_tree_together(tmp_path: Path) -> None:
    book = tmp_path / "book.md"
    book.write_text("\n\n".join(sentence(n, 300) for n in range(60)))
    for n in range(5):
        (tmp_path / "tree").mkdir(exist_ok=True)
        body = "\n".join(f"    x = f{n * 7 + i}(x) + {i}" for i in range(20))
        (tmp_path / "tree" / f"m{n}.py").write_text(f"def f{n}(x):\n{body}\n    return x\n")
    recipe = make_recipe(
        [{"name": "book", "path": str(book)}, {"name": "tree", "path": str(tmp_path / "tree")}],
        data={"validation_fraction": 0.001},
    )
    summary = prepare_data(recipe, RunDirectory(tmp_path / "run"))
    for name in ("book", "tree"):
        assert summary["sources"][name]["train"]["documents"] >= 1
        assert summary["sources"][name]["validation"]["documents"] == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["short"], "has no document left .*1 too short"),
        (["=+-*/ " * 40], "has no document left .*1 too few letters"),
    ],
)
def test_a_corpus_with_nothing_left_says_why(tmp_path: Path, texts: list[str], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(InputError, match=message):
        prepare_data(make_recipe([{"name": "s", "path": str(path)}]), RunDirectory(tmp_path / "run"))


def test_a_bpe_needs_text(tmp_path: Path) -> None:
    recipe = make_recipe([{"name": "s", "path": str(tmp_path / "x"), "format": "megatron"}])
    with pytest.raises(InputError, match="every source is packed already"):
        prepare_data(recipe, RunDirectory(tmp_path / "run"))


@pytest.mark.parametrize("step", ["clean_corpus", "pack_corpus"])
def test_a_full_disk_has_a_message_and_the_run_goes_on_later(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run = RunDirectory(tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(pipeline if step == "clean_corpus" else prepare, step, full)
        with pytest.raises(InputError, match="the disk is full"):
            prepare_data(recipe, run)
    assert prepare_data(recipe, run)["documents"]["kept"] == 30
