from __future__ import annotations

import random
import struct
from pathlib import Path

import megatron_format
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.data.documents import DocumentTable, join_document_tables, write_document_table
from anychip.data.indexed import IndexedCorpus, IndexedWriter, token_dtype
from anychip.errors import InputError

DOCUMENTS = st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=20), min_size=1, max_size=12)
NESTED = st.lists(
    st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=8), max_size=3), min_size=1, max_size=8
).filter(lambda documents: any(documents))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@settings(max_examples=50, deadline=None)
@given(documents=DOCUMENTS, vocab_size=st.sampled_from([1000, 65_499, 65_500, 131_072]))
def test_what_we_write_another_reader_reads(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int
) -> None:
    prefix = tmp_path_factory.mktemp("write") / "corpus"
    with IndexedWriter(prefix, token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.add(document)
    found, code = megatron_format.read(prefix)
    assert found == [[document] for document in documents]
    assert code == (8 if vocab_size < 65_500 else 4)


@settings(max_examples=100, deadline=None)
@given(documents=NESTED, code=st.sampled_from(sorted(megatron_format.CODES)))
def test_what_another_writer_writes_we_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], code: int
) -> None:
    prefix = tmp_path_factory.mktemp("read") / "corpus"
    megatron_format.write(prefix, documents, code)
    corpus = IndexedCorpus(prefix)
    flat = [[token for sequence in document for token in sequence] for document in documents]
    stream = [token for document in flat for token in document]
    assert corpus.document_count == len(documents)
    assert corpus.tokens(0, corpus.token_count).tolist() == stream
    assert corpus.tokens(0, 1).dtype == np.int64
    assert corpus.foreign_token(max(stream) + 1) is None
    assert corpus.foreign_token(max(stream)) == max(stream)
    for number, document in enumerate(flat):
        start, stop = corpus.document_start(number), corpus.document_start(number + 1)
        assert corpus.tokens(start, stop).tolist() == document
        for position in range(start, stop):
            assert corpus.document_at(position) == number


def test_nothing_appears_when_writing_fails(folder: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(folder / "corpus", "<u2") as writer:
        writer.add([1, 2])
        raise RuntimeError
    assert list(folder.iterdir()) == []


def _refused(prefix: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        IndexedCorpus(prefix)


def test_damaged_pairs_are_refused(folder: Path) -> None:
    prefix = folder / "corpus"
    _refused(prefix, "cannot be read")
    megatron_format.write(prefix, [[[1, 2, 3]], [[4, 5]]], 8)
    index, tokens = (folder / "corpus.idx").read_bytes(), (folder / "corpus.bin").read_bytes()

    def with_index(content: bytes) -> Path:
        (folder / "corpus.idx").write_bytes(content)
        return prefix

    _refused(with_index(b""), "is empty")
    _refused(with_index(index[:20]), "ends within its header")
    _refused(with_index(b"NOTANIDX\0" + index[9:]), "does not begin with MMIDIDX")
    _refused(with_index(index[:9] + struct.pack("<Q", 2) + index[17:]), "version 2")
    _refused(with_index(index[:17] + b"\x06" + index[18:]), "dtype code 6")
    _refused(with_index(index[:-1]), "announces 2 sequences")
    _refused(with_index(index + b"\0"), "announces 2 sequences")
    _refused(with_index(index[:18] + struct.pack("<Q", 2**61) + index[26:]), "announces")
    _refused(with_index(index[:34] + struct.pack("<i", -3) + index[38:]), "do not follow one another")
    _refused(with_index(index[:42] + struct.pack("<q", 8) + index[50:]), "do not follow one another")
    _refused(with_index(index[:58] + struct.pack("<q", 1) + index[66:]), "run from 0")
    _refused(with_index(index[:66] + struct.pack("<q", 9) + index[74:]), "do not rise")
    with_index(index)
    (folder / "corpus.bin").write_bytes(tokens[:-2])
    _refused(prefix, "describes 10 bytes of tokens, but the .bin file has 8")
    (folder / "corpus.bin").unlink()
    _refused(prefix, "cannot be read")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_no_damage_is_read_as_a_corpus_of_other_size(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    megatron_format.write(folder / "c", [[[n] * (n % 5 + 1)] for n in range(9)], 4)
    generator = random.Random(seed)
    content = bytearray((folder / "c.idx").read_bytes())
    for _ in range(generator.randrange(1, 5)):
        content[generator.randrange(len(content))] = generator.randrange(256)
    (folder / "c.idx").write_bytes(bytes(content[: generator.randrange(1, len(content) + 1)]))
    try:
        corpus = IndexedCorpus(folder / "c")
    except InputError:
        return
    for document in range(corpus.document_count):
        corpus.tokens(corpus.document_start(document), corpus.document_start(document + 1))


@given(st.lists(st.lists(st.text(max_size=12), max_size=6), max_size=4))
def test_document_tables_join(tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("tables")
    tables = []
    for number, names in enumerate(parts):
        path = folder / f"{number}"
        write_document_table(path, [name.encode() for name in names], np.arange(len(names), dtype=np.int64))
        tables.append(DocumentTable(path))
    join_document_tables(tables, folder / "joined")
    joined = DocumentTable(folder / "joined")
    names = [name for part in parts for name in part]
    assert [joined.id(index) for index in range(len(joined))] == names
    assert joined.text_bytes.tolist() == [index for part in parts for index in range(len(part))]
    for name in names:
        assert joined.find(name) == names.index(name)
    assert joined.find("not there at all") is None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_damaged_document_tables_are_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("tables") / "t"
    write_document_table(path, [b"one", b"two", b"three"], np.array([1, 2, 3]))
    generator = random.Random(seed)
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] = generator.randrange(256)
    path.write_bytes(bytes(content[: generator.randrange(1, len(content) + 1)]))
    try:
        table = DocumentTable(path)
    except InputError:
        return
    assert [len(table.id(index)) >= 0 for index in range(len(table))]
