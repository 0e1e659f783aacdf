"""Small training runs under many layouts: spawned gloo ranks that write what they computed, for tests to compare."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from expert_models import NAMED
from rank_pool import run_ranks

from anychip.chips.backend import detect_backend
from anychip.data.batch import IGNORE_LABEL, Batch, number_documents
from anychip.parallel.gradients import gradient_norm, scale_gradients
from anychip.parallel.parts import initialize_adapters, initialize_parts
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local, whole
from anychip.recipe.schema import (
    CheckpointConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
)
from anychip.train.engine import Engine
from anychip.train.job import TrainingJob
from anychip.train.objective import NextToken, Objective
from anychip.train.optimizer import Optimizer
from anychip.train.schedule import lr_share
from anychip.tune.policy import Policy
from anychip.tune.preference import Preference

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)
SEQ_LENGTH, GLOBAL_BATCH, STEPS, SEED = 32, 16, 20, 3
# As every recipe, with a warm-up. Adam's first step moves each weight by the whole rate, whichever way its gradient
# points; at the peak rate it would turn rounding into 4e-7 of the weights (in fp32), in one step and for good.
SCHEDULE = ScheduleConfig(kind="constant", warmup_steps=5)


class RandomTokens:
    """Batches by step, rows with unequal numbers of labels: a mean of means would be wrong. With `documents` attention
    stays between tokens 0, which end a document here; with `preference` each row has a log-probability to be compared
    with, and with `policy` each token has two, and each row an advantage."""

    def __init__(self, documents: bool = False, preference: bool = False, policy: bool = False) -> None:
        self._documents, self._preference, self._policy = documents, preference, policy

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, MODEL.vocab_size, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[::3, :9] = IGNORE_LABEL
        documents = number_documents(tokens[:, :-1] // 8, 0) if self._documents else None
        reference = -90 - 20 * torch.rand(GLOBAL_BATCH, generator=generator).double() if self._preference else None
        if self._policy:
            sampled, reference = (-4 - torch.rand(labels.shape, generator=generator).double() for _ in range(2))
            advantages = torch.randn(GLOBAL_BATCH, generator=generator).double()
            return Batch(tokens[:, :-1], labels, documents, reference, sampled, advantages)
        return Batch(tokens[:, :-1], labels, documents, reference)


@dataclass(frozen=True)
class LayoutRun:
    """One layout to train under, and what of the job differs from the plain one."""

    parallel: dict[str, Any]
    micro_batch_size: int = 1
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [f"{key}={value}" for key, value in {**self.parallel, **self.job}.items()]
        name = ",".join([*parts, f"micro_batch={self.micro_batch_size}"])
        return "".join(sign for sign in name if sign not in " '{}")

    @property
    def world_size(self) -> int:
        config = ParallelConfig(**self.parallel)
        return (
            (config.data_parallel_replicate or 1)
            * config.data_parallel_shard
            * config.tensor_parallel
            * config.pipeline_parallel
            * config.context_parallel
        )


def model_of(run: LayoutRun) -> ModelConfig:
    """MODEL, or one with experts: `model` names it. `changes` are other fields."""
    if "model" not in run.job:
        return MODEL.model_copy(update=run.job.get("changes", {}))
    return ModelConfig(**{**NAMED[run.job["model"]], **run.job.get("changes", {})})


def build(run: LayoutRun, steps: int = STEPS) -> tuple[TrainingJob, Processes, Engine, Optimizer]:
    """This process's part of the job, its parameters filled from SEED."""
    backend = detect_backend()
    job = TrainingJob(
        title="layout",
        directory=Path(),
        model=model_of(run),
        source=RandomTokens(run.job.get("documents", False), "preference" in run.job, "policy" in run.job),
        initialize=lambda parameters: None,
        evaluate=None,
        identity="",
        steps=steps,
        seq_length=SEQ_LENGTH,
        micro_batch_size=run.micro_batch_size,
        global_batch_size=GLOBAL_BATCH,
        seed=SEED,
        parallel=ParallelConfig(**run.parallel),
        optimizer=OptimizerConfig(name=run.job.get("optimizer", "adamw"), lr=1e-3, schedule=SCHEDULE),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
        loss_chunk_tokens=24,
        recompute=run.job.get("recompute", "none"),
        compile=run.job.get("compile", False),
        lora=LoraConfig(**run.job["lora"]) if "lora" in run.job else None,
        objective=_objective(run.job),
    )
    dtype = getattr(torch, run.job.get("dtype", "float64"))
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)  # of the master weights
    processes = Processes.join(job.parallel, backend.device(0), backend.collective_backend)
    engine = Engine(job, processes, dtype)
    initialize_parts(engine.parameters, job.model, SEED)
    initialize_adapters(engine.parameters, SEED)
    return job, processes, engine, Optimizer(engine.trainable, job.optimizer, dtype)


def _objective(job: Mapping[str, Any]) -> Objective:
    if "policy" in job:
        return Policy(0.2, 0.28, 0.1, job["policy"], SEQ_LENGTH)
    return Preference(job["preference"], 0.3) if "preference" in job else NextToken()


def train(run: LayoutRun, steps: int = STEPS) -> dict[str, Any]:
    """Train in this process's place; returns losses, gradient norms, gradients of step 1 and final state, whole."""
    job, processes, engine, optimizer = build(run, steps)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        engine.begin_step(step + 1)
        losses.append(float(engine.forward_backward(job.source.batch(step))))
        if step == 0:
            gradients = {
                name: whole(local(p.grad), p).cpu().clone()
                for name, p in engine.parameters.items()
                if p.grad is not None
            }
        norms.append(float(gradient_norm(engine.learned, processes)))
        scale_gradients(engine.learned, norms[-1], 1.0)
        optimizer.step(job.optimizer.lr * lr_share(SCHEDULE, step, steps))
        for parameter in engine.parameters.values():
            parameter.grad = None
    score = engine.score(job.source.batch(steps))
    weights = {name: whole(local(p.detach()), p).cpu().clone() for name, p in engine.parameters.items()}
    return {"losses": losses, "norms": norms, "score": score, "gradients": gradients, "weights": weights}


def run_layouts(
    runs: list[LayoutRun],
    folder: Path,
    timeout: float = 240.0,
    environment: Mapping[str, str] | None = None,
    steps: int = STEPS,
) -> None:
    """Train under each layout (all of one world size), one after another in the same spawned ranks.

    Each leaves FOLDER/NAME.rank-R.safetensors with what rank R holds, and NAME.json. Raises when a rank fails or the
    time is over.
    """
    (world_size,) = {run.world_size for run in runs}
    run_ranks(world_size, _train_all, (runs, folder, steps), folder, timeout, environment)


def _train_all(argument: tuple[list[LayoutRun], Path, int]) -> None:
    from safetensors.torch import save_file

    runs, folder, steps = argument
    rank = os.environ["RANK"]
    for run in runs:
        result = train(run, steps)
        tensors = {f"weights.{k}": v.contiguous() for k, v in result["weights"].items()}
        tensors |= {f"gradients.{k}": v.contiguous() for k, v in result["gradients"].items()}
        save_file(tensors, folder / f"{run.name}.rank-{rank}.safetensors")
        if rank == "0":
            numbers = {key: result[key] for key in ("losses", "norms", "score")}
            (folder / f"{run.name}.json").write_text(json.dumps(numbers))


def read(run: LayoutRun, folder: Path) -> dict[str, Any]:
    """What all ranks left of one layout: numbers of rank 0, tensors of all stages."""
    from safetensors.torch import load_file

    result: dict[str, Any] = json.loads((folder / f"{run.name}.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for rank in range(run.world_size):
        tensors |= load_file(folder / f"{run.name}.rank-{rank}.safetensors")
    return {**result, "tensors": tensors}
