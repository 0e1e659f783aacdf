"""The insides of one file: plain text, JSON lines, Parquet; gzip and zstd around the first two."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from anychip.errors import InputError

MAX_JSON_LINE_BYTES = 64 << 20
MAX_TEXT_DOCUMENT_CHARACTERS = 1 << 20
_BLOCK_BYTES = 1 << 20
_PARQUET_BATCH_ROWS = 256


class NotTextError(Exception):
    """The bytes are not text in an encoding that the file announces or in UTF-8."""


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed when its name ends in .gz or .zst; damage becomes an InputError."""
    suffix = path.suffix.lower()
    compression = {".gz": "gzip", ".zst": "zstd"}.get(suffix)
    try:
        if compression is None:
            with path.open("rb") as plain:
                yield plain
        else:
            import pyarrow as pa

            with pa.OSFile(str(path), "rb") as raw, pa.CompressedInputStream(raw, compression) as stream:
                yield io.BufferedReader(stream, buffer_size=1 << 20)
    except (EOFError, OSError) as error:
        what = f"is damaged: its {compression} data cannot be read" if compression else "cannot be read"
        raise InputError(f"{what} ({str(error) or 'it ends early'}).", where=path, do="Fetch the file again.") from None


def read_text(path: Path, piece_characters: int = MAX_TEXT_DOCUMENT_CHARACTERS) -> Iterator[str]:
    """The text of a file in pieces of at most `piece_characters`, cut at line ends where there are any.

    Raises NotTextError on NUL characters or bytes that are not in the file's encoding: UTF-8, UTF-16 behind a byte
    order mark, or what a Python source declares.
    """
    pending = ""
    for block in _decoded(path):
        pending += block
        while len(pending) > piece_characters:
            cut = pending.rfind("\n", 0, piece_characters) + 1 or piece_characters
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending


def _decoded(path: Path) -> Iterator[str]:
    with open_bytes(path) as handle:
        block = handle.read(_BLOCK_BYTES)
        encoding = _encoding(path, block)
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            while block:
                text = decoder.decode(block)
                if "\0" in text:
                    raise NotTextError("it holds NUL characters")
                yield text
                block = handle.read(_BLOCK_BYTES)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise NotTextError(f"it is not {encoding}") from None


def read_jsonl(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every line; blank lines are passed over."""
    import orjson

    with open_bytes(path) as handle:
        number = 0
        while line := handle.readline(MAX_JSON_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_JSON_LINE_BYTES:
                raise InputError(f"line {number} is longer than 64 MiB.", where=path, do="Split the document.")
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise InputError(
                    f"line {number} is not valid JSON ({error}).", where=path, do="Repair or remove the line."
                ) from None
            yield number, _field(record, field, path, f"line {number}")


def read_parquet(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(row from 0, text) of every row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            if field not in names:
                raise _missing(field, names, path, "the table")
            kind = parquet.schema_arrow.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(
                    f"column {field} holds {kind}, not text.", where=path, do="Name a text column in text_field."
                )
            for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield row, text or ""
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else "it ends early"
        raise InputError(
            f"is damaged or not Parquet ({first_line}).", where=path, do="Fetch or write the file again."
        ) from None


def _encoding(path: Path, head: bytes) -> str:
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if path.suffix == ".py":
        import tokenize

        try:
            return tokenize.detect_encoding(io.BytesIO(head).readline)[0]
        except SyntaxError:
            return "utf-8"
    return "utf-8"


def _field(record: object, field: str, path: Path, place: str) -> str:
    if not isinstance(record, dict):
        raise InputError(f"{place} is not a JSON object.", where=path, do='Each line must look like {"text": "..."}.')
    if field not in record:
        raise _missing(field, list(record), path, place)
    text = record[field]
    if not isinstance(text, str):
        raise InputError(
            f"{place}: field {field} holds {type(text).__name__}, not text.",
            where=path,
            do="Name a text field in text_field.",
        )
    return text


def _missing(field: str, known: list[str], path: Path, place: str) -> InputError:
    shown = ", ".join(map(str, known[:10])) or "none"
    return InputError(
        f"{place} has no field {field}; its fields: {shown}.", where=path, do="Set text_field to one of them."
    )
