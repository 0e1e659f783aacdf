"""Where the tasks of a pipeline stage run: in processes of this machine, as Slurm jobs, or on a Ray cluster."""

from __future__ import annotations

import importlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from anychip.errors import AnychipError, InputError
from anychip.progress import progress
from anychip.recipe.schema import ExecutorConfig

_CLUSTER_POLL_SECONDS = 10.0


def executor_for(
    name: str, steps: list[PipelineStep], tasks: int, logs: str, config: ExecutorConfig
) -> PipelineExecutor:
    """The executor that a recipe chose. Raises InputError when it cannot be used here."""
    return _EXECUTORS[config.kind](name, steps, tasks, logs, config)


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local tasks in processes of ours: they end with their parent, and datatrove's log, which would
    fill the terminal, is off.
    """

    def run(self) -> None:
        for rank in self.get_incomplete_ranks():
            deepcopy(self)._run_for_rank(rank)

    def run_in(self, pool: ProcessPoolExecutor) -> None:
        tasks = [pool.submit(_run_task, self, rank) for rank in self.get_incomplete_ranks()]
        for task in as_completed(tasks):
            task.result()


def silence_datatrove() -> None:
    logger.disable("datatrove")


def _run_task(executor: LocalExecutor, rank: int) -> None:
    executor._run_for_rank(rank)


def wait_until_done(executor: PipelineExecutor, name: str) -> None:
    """Schedulers return at once; the next stage needs this one's files."""
    left = len(executor.get_incomplete_ranks(skip_completed=True))
    if not left:
        return
    with progress(f"{name}: waiting for cluster tasks", left, "tasks") as bar:
        while left:
            queued = _is_queued(executor)
            now_left = len(executor.get_incomplete_ranks(skip_completed=True))
            bar.advance(left - now_left)
            left = now_left
            if left and not queued:
                raise AnychipError(
                    f"{left} tasks of the stage {name} failed.",
                    where=executor.logging_dir.path,
                    do="Read the logs there and run again; finished tasks are kept.",
                )
            if left:
                time.sleep(_CLUSTER_POLL_SECONDS)


def _is_queued(executor: PipelineExecutor) -> bool:
    """Whether a scheduler still has jobs of this executor; executors without one have ended all their tasks."""
    job = getattr(executor, "job_id", None)
    if job is None or shutil.which("squeue") is None:
        return False
    answer = subprocess.run(["squeue", "-h", "-j", str(job)], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and bool(answer.stdout.strip())


def _local(name: str, steps: list[PipelineStep], tasks: int, logs: str, config: ExecutorConfig) -> PipelineExecutor:
    return LocalExecutor(steps, tasks=tasks, logging_dir=logs)


def _slurm(name: str, steps: list[PipelineStep], tasks: int, logs: str, config: ExecutorConfig) -> PipelineExecutor:
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
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
    )


def _ray(name: str, steps: list[PipelineStep], tasks: int, logs: str, config: ExecutorConfig) -> PipelineExecutor:
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise InputError("data.executor.kind is ray, but ray is not installed.", do="pip install ray") from None
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        ray.init()
    return RayPipelineExecutor(steps, tasks=tasks, logging_dir=logs)


_Launch = Callable[[str, list[PipelineStep], int, str, ExecutorConfig], PipelineExecutor]
_EXECUTORS: dict[str, _Launch] = {"local": _local, "slurm": _slurm, "ray": _ray}
