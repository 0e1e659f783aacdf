"""Reading, cleaning, deduplication and split as datatrove pipelines, on this machine or on a cluster.

Four stages, as datatrove's MinHash needs them: read and clean every document and write its signature; match
signatures bucket by bucket; cluster the matches; keep one document of each cluster and write it to its side of the
split. Each task of a stage is skipped when an earlier, interrupted run ended it.

Near-duplicates follow Broder 1997 (MinHash) with banding: with b buckets of r hashes, documents of Jaccard similarity
s are matched with probability 1 - (1 - s^r)^b.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from datatrove.data import Document as PipelineDocument
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

from anychip.data.clean import normalize, reason_to_drop
from anychip.data.mix64 import mix64
from anychip.data.processes import worker_pool
from anychip.data.readers import InputFile, read_file
from anychip.data.split import side
from anychip.errors import InputError
from anychip.progress import progress
from anychip.recipe.schema import CleaningConfig, DataConfig, ExecutorConfig, SourceConfig

# A word, or one character of a script that is written without spaces.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_SIGNATURE_ROWS = 4096
_SMALL_CORPUS_BYTES = 64 << 20
_CLUSTER_POLL_SECONDS = 10.0
_GROWTH_POLL_SECONDS = 0.5


def clean_corpus(
    config: DataConfig, files: list[tuple[SourceConfig, InputFile]], work: Path, documents: Path
) -> dict[str, int]:
    """Run the stages; kept documents end in `documents/{train,validation}/SOURCE/TASK.jsonl`.

    `work` holds what is needed between stages and to continue after an interruption. Returns counts of documents:
    read, kept, and one for each reason why others were left out.
    """
    read: list[PipelineStep] = [ReadSources(files)]
    if config.cleaning.enabled:
        if config.cleaning.normalize:
            read.append(Normalize())
        read.append(QualityFilter(config.cleaning))
    keep: list[PipelineStep] = [
        AssignSide(config.validation_fraction),
        WriteDocuments(documents, "${side}/${source}/${rank}.jsonl"),
    ]
    total_bytes = sum(file.size for _, file in files)
    run = _Stages(config, work)
    if not config.dedup.enabled:
        with _growth("reading and cleaning", documents, total_bytes):
            run("read", [*read, *keep], config.executor.tasks)
        return run.counts()
    minhash = MinhashConfig(
        n_grams=config.dedup.ngram,
        num_buckets=config.dedup.buckets,
        hashes_per_bucket=config.dedup.hashes_per_bucket,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )
    cleaned, signatures, matches, removed = (work / name for name in ("clean", "signatures", "matches", "removed"))
    with _growth("reading and cleaning", cleaned, total_bytes):
        sign = Signatures(str(signatures), minhash)
        run("read", [*read, WriteDocuments(cleaned, "${rank}.jsonl"), sign], config.executor.tasks)
    removed.mkdir(exist_ok=True)
    # datatrove reads a block of `lines_to_buffer` signatures from every task's file; its default of 5 is slow.
    match = MinhashDedupBuckets(str(signatures), str(matches), config=minhash, lines_to_buffer=_SIGNATURE_ROWS)
    # Starting processes takes longer than matching the signatures of a small corpus.
    run("match", [match], config.dedup.buckets, in_processes=_folder_bytes(cleaned) > _SMALL_CORPUS_BYTES)
    cluster = Cluster(str(matches), str(removed), config=minhash, lines_to_buffer=_SIGNATURE_ROWS)
    run("cluster", [cluster], 1, in_processes=False)
    with _growth("removing near-duplicates", documents, _folder_bytes(cleaned)):
        run("keep", [ReadCleaned(cleaned), MinhashDedupFilter(str(removed)), *keep], config.executor.tasks)
    return run.counts()


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
        for start in range(0, len(shingles), _SIGNATURE_ROWS):
            block = np.asarray(super().get_signature(shingles[start : start + _SIGNATURE_ROWS]), np.uint64)
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


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local tasks in processes of ours: they end with their parent, and datatrove's log, which would
    fill the terminal, is off.
    """

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                deepcopy(self)._run_for_rank(rank)
        elif ranks:
            with worker_pool(self.workers, _silence_datatrove) as pool:
                for future in as_completed([pool.submit(_run_task, self, rank) for rank in ranks]):
                    future.result()


def _silence_datatrove() -> None:
    logger.disable("datatrove")


def _run_task(executor: LocalExecutor, rank: int) -> None:
    executor._run_for_rank(rank)


class WriteDocuments(JsonlWriter):
    """JSON lines of id, source and text. `template` may name `${side}`, `${source}` and must name `${rank}`."""

    def __init__(self, folder: Path, template: str) -> None:
        super().__init__(str(folder), output_filename=template, compression=None)

    def _default_adapter(self, document: PipelineDocument) -> dict[str, str]:
        return {"id": document.id, "source": document.metadata["source"], "text": document.text}


class _Stages:
    """Runs one stage after another where the recipe says, and adds up what their tasks counted."""

    def __init__(self, config: DataConfig, work: Path) -> None:
        self.config, self.work = config, work
        self.workers = config.workers or os.cpu_count() or 1
        self._logs: list[tuple[Path, int]] = []

    def __call__(self, name: str, steps: list[PipelineStep], tasks: int, in_processes: bool = True) -> None:
        logs = self.work / "logs" / name
        self._logs.append((logs, tasks))
        _silence_datatrove()
        try:
            executor = _EXECUTORS[self.config.executor.kind](
                name, steps, tasks, min(self.workers, tasks) if in_processes else 1, str(logs), self.config.executor
            )
            executor.run()
            _wait(executor, name)
        finally:
            logger.enable("datatrove")

    def counts(self) -> dict[str, int]:
        """Sums over all tasks, read from the files that datatrove writes, whichever executor ran them."""
        total: Counter[str] = Counter()
        for logs, tasks in self._logs:
            for rank in range(tasks):
                for step in json.loads((logs / "stats" / f"{rank:05d}.json").read_text(encoding="utf-8")):
                    for label, value in step["stats"].items():
                        total[_count_name(step["name"], label)] += _count(value)
        del total[""]
        return dict(total)


def _count(value: Any) -> int:
    return int(value["total"] if isinstance(value, dict) else value)


def _count_name(step: str, label: str) -> str:
    if label in ("read", "kept") or label.startswith("skipped "):
        return label
    if label.startswith("dropped_"):
        return label.removeprefix("dropped_")
    return "duplicate" if label == "dropped" and "MinHash" in step else ""


def _wait(executor: PipelineExecutor, name: str) -> None:
    """Schedulers return at once; the next stage needs this one's files."""
    left = len(executor.get_incomplete_ranks(skip_completed=True))
    if not left:
        return
    with progress(f"{name}: waiting for cluster tasks", left, "tasks") as bar:
        while left:
            time.sleep(_CLUSTER_POLL_SECONDS)
            now_left = len(executor.get_incomplete_ranks(skip_completed=True))
            bar.advance(left - now_left)
            left = now_left


def _local(
    name: str, steps: list[PipelineStep], tasks: int, workers: int, logs: str, config: ExecutorConfig
) -> PipelineExecutor:
    return LocalExecutor(steps, tasks=tasks, workers=workers, logging_dir=logs)


def _slurm(
    name: str, steps: list[PipelineStep], tasks: int, workers: int, logs: str, config: ExecutorConfig
) -> PipelineExecutor:
    import shutil

    from datatrove.executor.slurm import SlurmPipelineExecutor

    if config.slurm_partition is None:
        raise InputError("data.executor.slurm_partition is missing.", do="Name the partition to submit to.")
    if shutil.which("sbatch") is None:
        raise InputError("data.executor.kind is slurm, but there is no sbatch here.", do="Run on a Slurm login node.")
    return SlurmPipelineExecutor(
        steps,
        tasks=tasks,
        time=config.slurm_time,
        partition=config.slurm_partition,
        job_name=f"anychip-{name}",
        logging_dir=logs,
        slurm_logs_folder=f"{logs}/slurm",
        mail_type="NONE",
    )


def _ray(
    name: str, steps: list[PipelineStep], tasks: int, workers: int, logs: str, config: ExecutorConfig
) -> PipelineExecutor:
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise InputError("data.executor.kind is ray, but ray is not installed.", do="pip install ray") from None
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        ray.init()
    return RayPipelineExecutor(steps, tasks=tasks, logging_dir=logs)


_Launch = Callable[[str, list[PipelineStep], int, int, str, ExecutorConfig], PipelineExecutor]
_EXECUTORS: dict[str, _Launch] = {"local": _local, "slurm": _slurm, "ray": _ray}


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.jsonl")) if folder.is_dir() else 0


@contextmanager
def _growth(title: str, folder: Path, total: int) -> Generator[None, None, None]:
    """Show how far the tasks are by what they have written: they run in other processes or on other machines."""
    ended = threading.Event()

    def watch() -> None:
        shown = 0
        while not ended.wait(_GROWTH_POLL_SECONDS):
            now = min(_folder_bytes(folder), total)
            bar.advance(now - shown)
            shown = now

    with progress(title, total, "bytes") as bar:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
