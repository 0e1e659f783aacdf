"""Documents to a packed corpus, on all cores, so that a kill at any moment costs only the part being written.

The input is cut into parts at line ends. Each part is tokenized by one process and published by its document table,
written last; a later run takes finished parts as they are. Then the parts are joined in order, so the result does
not depend on how many processes there were, and published by PREFIX.json with counts and SHA-256 digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from anychip.data.documents import DocumentTable, join_document_tables, write_document_table
from anychip.data.indexed import IndexedCorpus, IndexedWriter, bin_path, idx_path, token_dtype, write_idx
from anychip.data.integrity import BlockHasher, blocks_path
from anychip.data.processes import worker_pool
from anychip.data.tokenizer import Tokenizer, load_tokenizer
from anychip.files import atomic_writer, sha256_file, sha256_json, write_json
from anychip.progress import progress

_PART_BYTES = 2 << 20
_MAX_PARTS = 4096
_BATCH_CHARACTERS = 1 << 20
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class PackedCounts:
    """What a packed corpus holds. `text_bytes` is the UTF-8 size of the documents, `tokens` counts their ends too."""

    documents: int
    tokens: int
    text_bytes: int
    bin_sha256: str
    idx_sha256: str
    blocks_sha256: str
    documents_sha256: str


@dataclass(frozen=True)
class _Part:
    """Bytes [start, end) of a file of JSON lines, whole lines only."""

    path: Path
    start: int
    end: int


def documents_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".documents")


def counts_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def pack_corpus(inputs: list[Path], prefix: Path, tokenizer_folder: Path, workers: int) -> PackedCounts:
    """Tokenize the documents in `inputs` (JSON lines with `id` and `text`) into PREFIX.bin/.idx/.documents/.json.

    Every document ends with the tokenizer's end token.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    parts = list(_cut(inputs))
    key = sha256_json([tokenizer.digest, [[str(p.path), p.path.stat().st_mtime_ns, p.start, p.end] for p in parts]])
    folder = prefix.with_name(f".{prefix.name}.parts-{key[:16]}")
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = [folder / f"{number:06d}" for number in range(len(parts))]
    todo = [(part, out) for part, out in zip(parts, prefixes, strict=True) if not documents_path(out).is_file()]
    with progress(f"packing {prefix.name}", sum(part.end - part.start for part, _ in todo), "bytes") as bar:
        for size in _pack_parts(todo, tokenizer, tokenizer_folder, workers):
            bar.advance(size)
    counts = _join(prefixes, prefix, token_dtype(tokenizer.vocab_size))
    write_json(counts_path(prefix), asdict(counts))
    for leftover in prefix.parent.glob(f".{prefix.name}.parts-*"):
        shutil.rmtree(leftover)
    return counts


def read_counts(prefix: Path) -> PackedCounts | None:
    """The counts of a finished packed corpus, or None."""
    path = counts_path(prefix)
    return PackedCounts(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _cut(inputs: list[Path]) -> Iterator[_Part]:
    """Parts of about equal size that end at line ends; the cut does not depend on the machine."""
    size = max(_PART_BYTES, sum(path.stat().st_size for path in inputs) // _MAX_PARTS)
    for path in inputs:
        total = path.stat().st_size
        start = 0
        with path.open("rb") as handle:
            while start < total:
                handle.seek(min(start + size, total) - 1)
                handle.readline()
                end = handle.tell()
                yield _Part(path, start, end)
                start = end


def _pack_parts(
    todo: list[tuple[_Part, Path]], tokenizer: Tokenizer, tokenizer_folder: Path, workers: int
) -> Iterator[int]:
    """Pack each part; yields its input bytes when it is done."""
    if workers <= 1 or len(todo) <= 1:
        for part, out in todo:
            yield _pack_part(tokenizer, part, out)
        return
    with worker_pool(min(workers, len(todo)), _load_in_worker, tokenizer_folder) as pool:
        for future in as_completed([pool.submit(_pack_in_worker, part, out) for part, out in todo]):
            yield future.result()


_worker_tokenizer: list[Tokenizer] = []  # in a worker process: its one tokenizer, loaded when it starts


def _load_in_worker(tokenizer_folder: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer.append(load_tokenizer(tokenizer_folder))


def _pack_in_worker(part: _Part, out: Path) -> int:
    return _pack_part(_worker_tokenizer[0], part, out)


def _pack_part(tokenizer: Tokenizer, part: _Part, out: Path) -> int:
    ids: list[bytes] = []
    sizes: list[int] = []
    end = tokenizer.eos_id
    with IndexedWriter(out, token_dtype(tokenizer.vocab_size)) as writer:
        for batch in _batches(part):
            for (name, size, _), tokens in zip(batch, tokenizer.encode_batch([t for _, _, t in batch]), strict=True):
                tokens.append(end)
                writer.add(tokens)
                ids.append(name)
                sizes.append(size)
    write_document_table(documents_path(out), ids, np.asarray(sizes, np.int64))
    return part.end - part.start


def _batches(part: _Part) -> Iterator[list[tuple[bytes, int, str]]]:
    """Lists of (id, UTF-8 size, text) of about a million characters."""
    import orjson

    batch: list[tuple[bytes, int, str]] = []
    characters = 0
    with part.path.open("rb") as handle:
        handle.seek(part.start)
        while handle.tell() < part.end:
            record = orjson.loads(handle.readline())
            text = record["text"]
            batch.append((record["id"].encode(), len(text.encode()), text))
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _join(parts: list[Path], prefix: Path, dtype: str) -> PackedCounts:
    """Put the parts one behind the other under the final names."""
    digest, blocks = hashlib.sha256(), BlockHasher()
    with atomic_writer(bin_path(prefix)) as joined:
        for part in parts:
            with bin_path(part).open("rb") as handle:
                while block := handle.read(_COPY_BYTES):
                    joined.write(block)
                    digest.update(block)
                    blocks.update(block)
    with atomic_writer(blocks_path(prefix)) as table:
        table.write(blocks.finish())
    lengths = [IndexedCorpus(part).sequence_lengths for part in parts]
    write_idx(prefix, dtype, np.concatenate([*lengths, np.empty(0, np.int32)]).astype(np.int32))
    tables = [DocumentTable(documents_path(part)) for part in parts]
    join_document_tables(tables, documents_path(prefix))
    return PackedCounts(
        documents=sum(len(table) for table in tables),
        tokens=sum(int(part.sum(dtype=np.int64)) for part in lengths),
        text_bytes=sum(int(table.text_bytes.sum()) for table in tables),
        bin_sha256=digest.hexdigest(),
        idx_sha256=sha256_file(idx_path(prefix)),
        blocks_sha256=sha256_file(blocks_path(prefix)),
        documents_sha256=sha256_file(documents_path(prefix)),
    )
