"""The steps of the data pipeline, each a datatrove block: documents in, documents out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from datatrove.data import Document as PipelineDocument
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.word_tokenizers import WordTokenizer

from anychip.data.clean import normalize, reason_to_drop
from anychip.data.mix64 import mix64
from anychip.data.readers import InputFile, read_file
from anychip.data.split import side
from anychip.recipe.schema import CleaningConfig, SourceConfig

# A word, or one character of a script that is written without spaces.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
SIGNATURE_ROWS = 4096


class ReadSources(PipelineStep):
    """Documents of every `world_size`-th file, so that neighbours in a folder spread over the tasks."""

    name = "read sources"
    type = "READER"

    def __init__(self, files: list[tuple[SourceConfig, InputFile]]) -> None:
        super().__init__()
        self.files = files

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        def count_skip(reason: str, _where: str) -> None:
            self.stat_update(f"skipped {reason}")

        for source, file in self.files[rank::world_size]:
            for document in read_file(source, file, count_skip):
                self.stat_update("read")
                yield PipelineDocument(text=document.text, id=document.id, metadata={"source": document.source})


class Normalize(BaseFormatter):
    """Repaired text."""

    name = "normalize"

    def format(self, text: str) -> str:
        return normalize(text)


class QualityFilter(BaseFilter):
    """Documents worth learning from."""

    name = "quality"

    def __init__(self, config: CleaningConfig) -> None:
        super().__init__()
        self.config = config

    def filter(self, doc: PipelineDocument) -> bool | tuple[bool, str]:
        reason = reason_to_drop(doc.text, self.config)
        return (False, reason) if reason else True


class Words(WordTokenizer):
    """Lower-case words by a regular expression: works for code and for Chinese, and downloads nothing."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"[^\n]+", text)]


class Signatures(MinhashDedupSignature):
    """datatrove's signatures from word hashes combined in numpy, which is several times faster than hashing strings.

    A document with fewer words than a shingle is one shingle by itself, so that exact copies of it are found too.
    """

    def __init__(self, output_folder: str, config: MinhashConfig) -> None:
        super().__init__(output_folder, config, language=Words())
        self._word_hashes = _WordHashes()

    def get_shingles(self, text: str) -> npt.NDArray[np.uint64]:
        words = self.word_tokenizer.word_tokenize(text)
        hashes = np.fromiter(map(self._word_hashes.__getitem__, words or [text]), np.uint64)
        n = min(self.config.n_grams, len(hashes))
        shingles = np.zeros(len(hashes) - n + 1, np.uint64)
        for offset in range(n):
            shingles = mix64(shingles + hashes[offset : offset + len(shingles)])
        return np.unique(shingles).reshape(-1, 1)

    def get_signature(self, shingles: npt.NDArray[np.uint64]) -> list[list[int]]:
        smallest: npt.NDArray[np.uint64] | None = None
        for start in range(0, len(shingles), SIGNATURE_ROWS):
            block = np.asarray(super().get_signature(shingles[start : start + SIGNATURE_ROWS]), np.uint64)
            smallest = block if smallest is None else np.minimum(smallest, block)
        return smallest.tolist() if smallest is not None else []


class _WordHashes(dict[str, int]):
    """64-bit hashes of words, kept because a corpus repeats its words; emptied when there are too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1 << 18:
            self.clear()
        value = int.from_bytes(hashlib.sha1(word.encode("utf-8", "replace")).digest()[:8], "little")
        self[word] = value
        return value


class Cluster(MinhashDedupCluster):
    """datatrove's clustering without its own progress bar."""

    def run(self, data: Any = None, _: int = 0, world_size: int = 1) -> None:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            super().run(data, _, world_size)


class ReadCleaned(PipelineStep):
    """The cleaned documents of this task, in the order in which their signatures were made."""

    name = "read cleaned"
    type = "READER"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        path = self.folder / f"{rank:05d}.jsonl"
        if not path.is_file():
            return
        with path.open("rb") as handle:
            for line in handle:
                record = orjson.loads(line)
                yield PipelineDocument(text=record["text"], id=record["id"], metadata={"source": record["source"]})


class AssignSide(PipelineStep):
    """Train or validation, by the text's digest."""

    name = "split"
    type = "SPLIT"

    def __init__(self, validation_fraction: float) -> None:
        super().__init__()
        self.validation_fraction = validation_fraction

    def run(self, data: Iterable[PipelineDocument], rank: int = 0, world_size: int = 1) -> Iterator[PipelineDocument]:
        for document in data:
            document.metadata["side"] = side(document.text, self.validation_fraction)
            self.stat_update("kept")
            yield document


class WriteDocuments(JsonlWriter):
    """JSON lines of id, source and text. `template` may name `${side}`, `${source}` and must name `${rank}`."""

    def __init__(self, folder: Path, template: str) -> None:
        super().__init__(str(folder), output_filename=template, compression=None)

    def _default_adapter(self, document: PipelineDocument) -> dict[str, str]:
        return {"id": document.id, "source": document.metadata["source"], "text": document.text}
