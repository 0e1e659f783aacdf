"""Whatever happens to prepared data on disk is noticed before a wrong token is used."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_format
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import make_recipe, sentence, write_jsonl

from anychip.data import integrity, prepare
from anychip.data.corpora import Corpus, open_corpora, open_tokenizer, read_summary
from anychip.data.integrity import BlockHasher, DamagedBlock
from anychip.data.prepare import prepare_data
from anychip.errors import InputError, UnfitError
from anychip.files import write_json
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory

Prepared = tuple[RunDirectory, Recipe]


@pytest.fixture(scope="module")
def small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integrity, "BLOCK_BYTES", 256)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_blocks: None) -> Prepared:
    """Two corpora made here, of the same shape, and one packed elsewhere; all of many blocks."""
    folder = tmp_path_factory.mktemp("prepared")
    for name, first in (("one", 0), ("two", 500)):
        write_jsonl(folder / f"{name}.jsonl", [sentence(first + n, 12) for n in range(60)])
    chance = random.Random(0)
    documents = [[[chance.randrange(7, 290) for _ in range(40)] + [2]] for _ in range(30)]
    megatron_format.write(folder / "theirs", documents, 8)
    sources: list[dict[str, Any]] = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in ("one", "two")]
    sources.append({"name": "theirs", "path": str(folder / "theirs"), "format": "megatron"})
    recipe, run = make_recipe(sources, data={"dedup": {"enabled": False}}), RunDirectory(folder / "run")
    prepare_data(recipe, run)
    return run, recipe


def everything(prepared: Prepared) -> dict[str, Any]:
    """All that training and evaluation take from the disk; tokens in pieces, in no order."""
    run, recipe = prepared
    read: dict[str, Any] = {"summary": read_summary(run), "tokenizer": open_tokenizer(run).digest}
    for side in ("train", "validation"):
        for corpus in open_corpora(run, recipe, side):  # type: ignore[arg-type]
            starts = range(0, corpus.token_count, 50)
            pieces = [corpus.tokens(at, min(at + 50, corpus.token_count)) for at in reversed(starts)]
            names = [corpus.document_id(n) for n in range(corpus.first, corpus.last)]
            sizes = corpus.table.text_bytes.tolist() if corpus.table else []
            read[f"{side}/{corpus.name}"] = (np.concatenate(pieces[::-1]).tobytes(), names, sizes)
    return read


def files_of(run: RunDirectory) -> list[Path]:
    packed = [run.data / side / f"{name}.{kind}" for side in ("train", "validation") for name in ("one", "two")
              for kind in ("bin", "idx", "blocks", "documents")]  # fmt: skip
    theirs = [run.root.parent / "theirs.bin", run.root.parent / "theirs.idx", run.data / "elsewhere" / "theirs.blocks"]
    return [*packed, *theirs, run.data / "summary.json", run.tokenizer / "tokenizer.json"]


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def lengthen(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 600)))


def swap_blocks(path: Path, chance: random.Random) -> None:
    data, size = bytearray(path.read_bytes()), chance.choice((8, 32, 256))
    a, b = (chance.randrange(max(len(data) // size, 1)) * size for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    path.write_bytes(data)


def repeat_a_block(path: Path, chance: random.Random) -> None:
    data, size = bytearray(path.read_bytes()), chance.choice((8, 32, 256))
    a, b = (chance.randrange(max(len(data) // size, 1)) * size for _ in range(2))
    data[a : a + size] = data[b : b + size]
    path.write_bytes(data)


def take_anothers(path: Path, chance: random.Random) -> None:
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    path.write_bytes(chance.choice(others).read_bytes() if others else b"")


def zero(path: Path, chance: random.Random) -> None:
    """What a power cut leaves of a page that was never flushed."""
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def lose(path: Path, chance: random.Random) -> None:
    path.unlink()


Damage = Callable[[Path, random.Random], None]
DAMAGES: list[Damage] = [flip, flip, flip, cut, lengthen, swap_blocks, repeat_a_block, take_anothers, zero, lose]


def outcomes(prepared: Prepared, count: int, seed: int) -> Counter[str]:
    """Damage one file at a time. Damages that left every byte as it was are counted apart, and not among `count`."""
    run, chance, seen = prepared[0], random.Random(seed), Counter[str]()
    good, files = everything(prepared), files_of(prepared[0])
    while seen.total() - seen["no byte changed"] < count:
        path = chance.choice(files)
        whole = path.read_bytes()
        try:
            chance.choice(DAMAGES)(path, chance)
            if path.exists() and path.read_bytes() == whole:
                seen["no byte changed"] += 1
                continue
            try:
                seen["missed" if everything(prepared) != good else "harmless"] += 1
            except (UnfitError, InputError) as error:
                whole_run = path.name == "summary.json" and error.where == str(run.root)  # it is missing
                named = path.stem in error.where or error.where == str(run.tokenizer) or whole_run
                seen["found and named" if named else f"found, but it says: {error}"] += 1
        finally:
            path.write_bytes(whole)
    return seen


def test_every_damage_is_found_and_the_file_named(prepared: Prepared) -> None:
    seen = outcomes(prepared, 300, seed=1)
    assert seen["found and named"] == 300, seen


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_thousand_damages_of_data_are_found(prepared: Prepared) -> None:
    seen = outcomes(prepared, 10_000, seed=2)
    print(dict(seen))
    assert seen["found and named"] == 10_000, seen


def test_only_what_is_read_is_verified(prepared: Prepared) -> None:
    run, recipe = prepared
    path = run.data / "train" / "one.bin"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        corpus = open_corpora(run, recipe, "train")[0]
        corpus.tokens(0, 100)
        with pytest.raises(DamagedBlock, match="wrong bytes between"):
            corpus.tokens(corpus.token_count - 1, corpus.token_count)
    finally:
        path.write_bytes(whole)


def test_data_of_an_older_release_is_verified_as_a_whole(prepared: Prepared, tmp_path: Path) -> None:
    run, _ = prepared
    held = read_summary(run)["sources"]["one"]["train"]
    older = {key: held[key] for key in ("documents", "tokens", "text_bytes", "bin_sha256", "idx_sha256")}
    for kind in ("bin", "idx", "documents"):
        shutil.copyfile(run.data / "train" / f"one.{kind}", tmp_path / f"one.{kind}")
    corpus = Corpus("one", tmp_path / "one", held=older)
    assert corpus.document_id(0).startswith("one:") and len(corpus.tokens(0, 10)) == 10
    flip(tmp_path / "one.bin", random.Random(0))
    with pytest.raises(UnfitError, match="digest differs"):
        Corpus("one", tmp_path / "one", held=older)
    (tmp_path / "old").mkdir()
    write_json(tmp_path / "old" / "data" / "summary.json", read_summary(run))
    assert read_summary(RunDirectory(tmp_path / "old")) == read_summary(run)


def test_a_damaged_record_of_a_step_is_made_again(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    run, recipe = prepared
    done: list[Path] = []
    pack = prepare.pack_corpus

    def noting(inputs: list[Path], prefix: Path, *more: Any) -> Any:
        done.append(prefix)
        return pack(inputs, prefix, *more)

    monkeypatch.setattr(prepare, "pack_corpus", noting)
    before = read_summary(run)
    path = run.data / "steps" / "packing-train-two.json"
    text = path.read_text()
    path.write_text(text.replace('"documents": ', '"documents": 1'))
    prepare_data(recipe, run)
    assert done == [run.data / "train" / "two"] and read_summary(run) == before and path.read_text() == text


def test_a_removed_file_is_made_again_by_the_same_command(prepared: Prepared) -> None:
    run, recipe = prepared
    good = everything(prepared)
    for path in (run.data / "train" / "one.bin", run.data / "elsewhere" / "theirs.blocks", run.data / "summary.json"):
        assert prepare.is_there(recipe, run)
        path.unlink()
        assert not prepare.is_there(recipe, run)
        prepare_data(recipe, run)
        assert everything(prepared) == good


@given(st.lists(st.binary(max_size=700), max_size=12))
def test_digests_do_not_depend_on_the_pieces(small_blocks: None, pieces: list[bytes]) -> None:
    whole, parts = BlockHasher(), BlockHasher()
    whole.update(b"".join(pieces))
    for piece in pieces:
        parts.update(piece)
    assert whole.finish() == parts.finish()
