from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.data import formats
from anychip.data.readers import fingerprint, list_files, read_documents
from anychip.errors import InputError
from anychip.recipe.schema import SourceConfig


def source(path: object, **fields: Any) -> SourceConfig:
    return SourceConfig(name="src", path=str(path), **fields)


def texts(path: object, **fields: Any) -> list[str]:
    return [document.text for document in read_documents(source(path, **fields))]


LINES = b'{"text": "one", "id": 1}\n\n{"text": "zwei \\u4f60"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES[:26], mtime=0) + gzip.compress(LINES[26:], mtime=0)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES[:26]) + zstandard.compress(LINES[26:])),
    ],
)
def test_json_lines_plain_and_compressed(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    documents = list(read_documents(source(path)))
    assert [document.text for document in documents] == ["one", "zwei 你"]
    assert [document.id for document in documents] == [f"src:{name}#1", f"src:{name}#3"]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["one", None, "three"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_field="body") == ["one", "three"]


def test_source_tree_keeps_text_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    (tmp_path / "pkg" / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# caf\u00e9\n".encode("latin-1"))
    (tmp_path / "pkg" / "empty.py").write_bytes(b"")
    (tmp_path / "pkg" / "broken.txt").write_bytes(b"\xff\xfe\xff\xff\x00")
    (tmp_path / "pkg" / "nul.md").write_bytes(b"a\0b")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "README").write_text("read me")
    skipped: Counter[str] = Counter()
    documents = list(read_documents(source(tmp_path), lambda reason, _: skipped.update([reason])))
    assert {document.id for document in documents} == {"src:README", "src:pkg/latin.py"}
    assert any("café" in document.text for document in documents)
    assert skipped == {"empty": 1, "not text": 2}


def test_include_chooses_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b.weird").write_text("b")
    assert texts(tmp_path, include=["*.weird"]) == ["b"]
    with pytest.raises(InputError, match="holds no readable files that match"):
        texts(tmp_path, include=["*.nothing"])


def test_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    whole = "".join(f"line {n} " + "x" * (n % 90) + "\n" for n in range(3000))
    path = tmp_path / "book.txt"
    path.write_text(whole, encoding="utf-8")
    pieces = texts(path)
    assert len(pieces) > 3
    assert "".join(pieces) == whole
    assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\x00\x01\x02", "is not text"),
        ("a.txt", b"caf\xe9", "is not text"),
        ("a.txt", b" \n ", "no document left"),
        ("a.jsonl", b"\x89PNG\r\n", "line 1 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 is not valid JSON"),
        ("a.jsonl", b'["a"]', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"body": "a", "lang": "en"}', "no field text; its fields: body, lang"),
        ("a.jsonl", b'{"text": 7}', "field text holds int"),
        ("a.jsonl.gz", b"not gzip", "damaged"),
        ("a.jsonl.gz", gzip.compress(LINES * 99, mtime=0)[:-12], "damaged"),
        ("a.jsonl.zst", b"not zstd", "damaged"),
        ("a.jsonl.zst", zstandard.compress(LINES * 99)[:-3], "damaged"),
        ("a.parquet", b"PAR1 nothing", "damaged or not Parquet"),
    ],
)
def test_bad_files_have_a_message(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        texts(path)
    assert error.value.where


def test_bad_parquet_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="holds int64, not text"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no field body; its fields: text"):
        texts(tmp_path / "a.parquet", text_field="body")


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(n) * 50 for n in range(1000)]}), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged"):
        texts(path)


def test_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_JSON_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * (32 << 20), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(InputError, match="line 1 is longer"):
        texts(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20, "the line must not be read whole"
    tracemalloc.stop()


def test_missing_path_and_unknown_package(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        texts(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no installed package"):
        texts("python:surely_not_installed_anywhere")
    with pytest.raises(InputError, match="does not name a package"):
        texts("python:../etc")


def test_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("hello")
    (tmp_path / "twin").symlink_to(tmp_path / "real")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone.txt")
    assert texts(tmp_path) == ["hello"], "a folder reached twice is read once, a dangling link not at all"
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    with pytest.raises(InputError, match="endless loop"):
        texts(tmp_path)


def test_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    with pytest.raises(InputError, match="leads to itself"):
        texts(tmp_path)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("hello")
    (document,) = read_documents(source(tmp_path))
    assert document.id.encode() == b"src:caf\\udce9.txt"


def test_fingerprint_follows_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    before = fingerprint(list_files(source(tmp_path)))
    assert before == fingerprint(list_files(source(tmp_path)))
    (tmp_path / "a.txt").write_text("hello again")
    assert before != fingerprint(list_files(source(tmp_path)))


def test_standard_library_has_sources_topics_and_documentation_of_c_objects() -> None:
    documents = {document.id: document.text for document in read_documents(source("python:stdlib"))}
    assert "def join(" in documents["src:posixpath.py"]
    assert "math.sqrt" in documents["src:builtin-objects#math"]
    assert "src:language-topics#for" in documents
    assert not any("/test/" in name or "site-packages" in name for name in documents)


def test_installed_package_is_found_without_importing_it() -> None:
    assert any("def " in text for text in texts("python:yaml"))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_always_an_input_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    lines = b"".join(json.dumps({"text": f"text {n} é", "n": n}).encode() + b"\n" for n in range(30))
    table = folder / "table.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(30)]}), table)
    kinds = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": table.read_bytes(),
        "a.py": b"# coding: utf-8\n" + lines,
    }
    name = data.draw(st.sampled_from(sorted(kinds)))
    content = bytearray(kinds[name])
    generator = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(generator.randrange(1, 6)):
        content[generator.randrange(len(content))] = generator.randrange(256)
    path = folder / name
    path.write_bytes(bytes(content[: generator.randrange(1, len(content) + 1)]))
    try:
        for document in read_documents(source(path)):
            document.text.encode()
    except InputError as error:
        assert str(error)
