"""Reading, cleaning, deduplication and split as datatrove pipelines, on this machine or on a cluster.

Four stages, as datatrove's MinHash needs them: read and clean every document and write its signature; match
signatures bucket by bucket; cluster the matches; keep one document of each cluster and write it to its side of the
split. Each task of a stage is skipped when an earlier, interrupted run ended it.

Near-duplicates follow Broder 1997 (MinHash) with banding: with b buckets of r hashes, documents of Jaccard similarity
s are matched with probability 1 - (1 - s^r)^b.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupFilter
from datatrove.utils.hashing import HashConfig
from loguru import logger

from anychip.data.blocks import (
    SIGNATURE_ROWS,
    AssignSide,
    Cluster,
    Normalize,
    QualityFilter,
    ReadCleaned,
    ReadSources,
    Signatures,
    WriteDocuments,
)
from anychip.data.executors import LocalExecutor, executor_for, silence_datatrove, wait_until_done
from anychip.data.processes import worker_pool
from anychip.data.readers import InputFile
from anychip.progress import progress
from anychip.recipe.schema import DataConfig, SourceConfig

_SMALL_CORPUS_BYTES = 64 << 20
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
    with _Stages(config, work) as run:
        if config.dedup.enabled:
            _read_and_deduplicate(run, read, keep, total_bytes, documents)
        else:
            with _growth("reading and cleaning", documents, total_bytes):
                run("read", [*read, *keep], config.executor.tasks)
        return run.counts()


def _read_and_deduplicate(
    run: _Stages, read: list[PipelineStep], keep: list[PipelineStep], total_bytes: int, documents: Path
) -> None:
    dedup, tasks = run.config.dedup, run.config.executor.tasks
    minhash = MinhashConfig(
        n_grams=dedup.ngram,
        num_buckets=dedup.buckets,
        hashes_per_bucket=dedup.hashes_per_bucket,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )
    cleaned, signatures, matches, removed = (run.work / name for name in ("clean", "signatures", "matches", "removed"))
    with _growth("reading and cleaning", cleaned, total_bytes):
        run("read", [*read, WriteDocuments(cleaned, "${rank}.jsonl"), Signatures(str(signatures), minhash)], tasks)
    removed.mkdir(exist_ok=True)
    # datatrove reads a block of `lines_to_buffer` signatures from every task's file; its default of 5 is slow.
    match = MinhashDedupBuckets(str(signatures), str(matches), config=minhash, lines_to_buffer=SIGNATURE_ROWS)
    # Starting processes takes longer than matching the signatures of a small corpus.
    run("match", [match], dedup.buckets, in_processes=_folder_bytes(cleaned) > _SMALL_CORPUS_BYTES)
    cluster = Cluster(str(matches), str(removed), config=minhash, lines_to_buffer=SIGNATURE_ROWS)
    run("cluster", [cluster], 1, in_processes=False)
    with _growth("removing near-duplicates", documents, _folder_bytes(cleaned)):
        run("keep", [ReadCleaned(cleaned), MinhashDedupFilter(str(removed)), *keep], tasks)


class _Stages:
    """Runs one stage after another where the recipe says, and adds up what their tasks counted."""

    def __init__(self, config: DataConfig, work: Path) -> None:
        self.config, self.work = config, work
        self._logs: list[tuple[Path, int]] = []
        self._open = ExitStack()

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @cached_property
    def _pool(self) -> ProcessPoolExecutor | None:
        """Processes for the local tasks of all stages, or None where one is enough."""
        workers = min(self.config.workers or os.cpu_count() or 1, self.config.executor.tasks)
        return self._open.enter_context(worker_pool(workers, silence_datatrove)) if workers > 1 else None

    def __call__(self, name: str, steps: list[PipelineStep], tasks: int, in_processes: bool = True) -> None:
        logs = self.work / "logs" / name
        self._logs.append((logs, tasks))
        silence_datatrove()
        try:
            executor = executor_for(name, steps, tasks, str(logs), self.config.executor)
            if isinstance(executor, LocalExecutor) and in_processes and self._pool is not None:
                executor.run_in(self._pool)
            else:
                executor.run()
                wait_until_done(executor, name)
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
