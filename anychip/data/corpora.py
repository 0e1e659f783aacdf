"""The packed corpora of a run, opened for reading: which documents and tokens train, which are held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anychip.data.documents import DocumentTable
from anychip.data.indexed import IndexedCorpus, Tokens, is_packed
from anychip.data.integrity import VerifiedBlocks, check_whole, read_sealed
from anychip.data.pack import documents_path
from anychip.data.split import Side
from anychip.data.tokenizer import Tokenizer, load_tokenizer
from anychip.errors import InputError, UnfitError
from anychip.recipe.schema import Recipe, SourceConfig
from anychip.rundir import RunDirectory

SUMMARY_KEYS = ("documents", "sources", "tokenizer")


@dataclass(frozen=True)
class DocumentSpan:
    """A document, or the part of one that lies inside some range: `tokens` from `start` within the document."""

    id: str
    index: int
    start: int
    tokens: int


class Corpus:
    """One source's documents first..last-1 of a packed corpus, as one stream of tokens beginning at 0.

    `held` is what the run's summary says of it, `blocks` the file of digests where that is not beside the tokens; what
    is read is then verified before it is used. Raises InputError for files that make no sense, UnfitError for ones that
    have changed.
    """

    def __init__(
        self,
        name: str,
        prefix: Path,
        first: int = 0,
        last: int | None = None,
        held: Mapping[str, Any] | None = None,
        blocks: Path | None = None,
    ) -> None:
        self.name, self.prefix, self._held = name, prefix, held or {}
        self.blocks = VerifiedBlocks(prefix, held, blocks) if held else None
        self.packed = IndexedCorpus(prefix)
        self.first = first
        self.last = self.packed.document_count if last is None else last
        self._offset = self.packed.document_start(self.first)
        self.token_count = self.packed.document_start(self.last) - self._offset

    @cached_property
    def table(self) -> DocumentTable | None:
        """Names and sizes of the documents; None for a corpus that was packed elsewhere."""
        path = documents_path(self.prefix)
        if "documents_sha256" in self._held:
            check_whole(path, self._held["documents_sha256"])
        elif not path.is_file():
            return None
        table = DocumentTable(path)
        if len(table) != self.packed.document_count:
            raise InputError(
                f"names {len(table)} documents, but the packed corpus has {self.packed.document_count}.",
                where=path,
                do="Remove the file and run `data` again.",
            )
        return table

    def tokens(self, start: int, stop: int) -> Tokens:
        """Token ids [stop - start], int64."""
        return self._read(self._offset + start, self._offset + stop)

    def document_tokens(self, document: int) -> Tokens:
        return self._read(self.packed.document_start(document), self.packed.document_start(document + 1))

    def _read(self, start: int, stop: int) -> Tokens:
        if self.blocks is not None:
            self.blocks.check(start * self.packed.dtype.itemsize, stop * self.packed.dtype.itemsize)
        return self.packed.tokens(start, stop)

    def document_range(self, document: int) -> tuple[int, int]:
        """Stream positions [start, stop) of a document."""
        return (
            self.packed.document_start(document) - self._offset,
            self.packed.document_start(document + 1) - self._offset,
        )

    def document_id(self, document: int) -> str:
        return self.table.id(document) if self.table else f"{self.name}#{document}"

    def find_document(self, document_id: str) -> int | None:
        """The index of a document by its id, when it belongs to this corpus."""
        if self.table:
            found = self.table.find(document_id)
        else:
            name, _, number = document_id.rpartition("#")
            found = int(number) if name == self.name and number.isdigit() else None
        return found if found is not None and self.first <= found < self.last else None

    def documents_between(self, start: int, stop: int) -> list[DocumentSpan]:
        """The documents that lie, wholly or in part, in [start, stop) of the stream."""
        spans = []
        position = start
        while position < stop:
            document = self.packed.document_at(self._offset + position)
            begin, end = self.document_range(document)
            size = min(end, stop) - position
            spans.append(DocumentSpan(self.document_id(document), document, position - begin, size))
            position += size
        return spans


def read_summary(run: RunDirectory) -> dict[str, Any]:
    """What `prepare_data` left in data/summary.json. Raises UnfitError when a byte of it was changed."""
    path = run.data / "summary.json"
    if not path.is_file():
        raise InputError("has no prepared data.", where=run.root, do="Run `anychip data RECIPE` first.")
    return read_sealed(path, SUMMARY_KEYS)


def open_tokenizer(run: RunDirectory) -> Tokenizer:
    """The tokenizer that the run's corpora were packed with. Raises UnfitError when it is another one now."""
    tokenizer = load_tokenizer(run.tokenizer)
    if tokenizer.digest != read_summary(run)["tokenizer"]["digest"]:
        do = "Restore it from a copy, or remove it and run `anychip data prepare RECIPE` again."
        raise UnfitError("is not the tokenizer that the corpora were packed with.", where=run.tokenizer, do=do)
    return tokenizer


def open_corpora(run: RunDirectory, recipe: Recipe, side: Side) -> list[Corpus]:
    """The corpora of one side of the split, in the recipe's order; a source without documents there is left out."""
    corpora = (_open(run, recipe, source, side) for source in recipe.data.sources)
    return [corpus for corpus in corpora if corpus is not None]


def packed_prefix(run: RunDirectory, name: str, side: Side) -> Path:
    return run.data / side / name


def _open(run: RunDirectory, recipe: Recipe, source: SourceConfig, side: Side) -> Corpus | None:
    if not is_packed(source):
        prefix = packed_prefix(run, source.name, side)
        held = read_summary(run)["sources"].get(source.name, {}).get(side)
        if held is None:
            raise InputError(
                f"has no packed data of source {source.name}.",
                where=run.root,
                do="Run `anychip data RECIPE` again: the recipe's sources have changed.",
            )
        return Corpus(source.name, prefix, held=held) if held["documents"] else None
    prefix = Path(source.path).expanduser()
    packed = IndexedCorpus(prefix)
    cut = held_out_from(packed, recipe.data.validation_fraction)
    first, last = (0, cut) if side == "train" else (cut, packed.document_count)
    if first >= last:
        return None
    held = read_summary(run)["sources"].get(source.name, {})
    if "blocks_sha256" not in held:  # an older release kept no digests of what was packed elsewhere
        return Corpus(source.name, prefix, first, last)
    return Corpus(source.name, prefix, first, last, held, foreign_blocks(run, source.name))


def foreign_blocks(run: RunDirectory, name: str) -> Path:
    """Where the digests of a corpus that was packed elsewhere are kept."""
    return run.data / "elsewhere" / f"{name}.blocks"


def held_out_from(packed: IndexedCorpus, validation_fraction: float) -> int:
    """Of a corpus packed elsewhere the last documents are held out, as Megatron splits; the first of these."""
    held_out = int(np.ceil(packed.document_count * validation_fraction))
    return packed.document_count - min(held_out, max(packed.document_count - 1, 0))


def foreign_token_error(token: int, vocab_size: int, prefix: Path) -> InputError:
    """What a user is told about a token id that the model does not have."""
    return InputError(
        f"holds token {token}, but model.vocab_size is {vocab_size}.",
        where=prefix,
        do="Use the tokenizer that the corpus was packed with, and a model that has its vocabulary.",
    )
