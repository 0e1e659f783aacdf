"""Training that grows: the recipe's models one after the other, each from what the one before left.

Every model has its checkpoints in a folder of its own; the last model's are where other stages look for them. A run is
at the last model that has a checkpoint, so that it may be stopped or killed anywhere, also while it grows.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.data.validation import validation_batches
from anychip.errors import InputError
from anychip.files import sha256_json, write_json
from anychip.grow.forward import forward_by_layer
from anychip.grow.opening import Growing
from anychip.grow.plan import GrowthPlan, grown_config, plan_growth, plan_of_record
from anychip.grow.proof import Proof, reader
from anychip.grow.source import CheckpointRows
from anychip.grow.stream import Stream, kept_extra
from anychip.grow.together import grow_together, open_store, ranks
from anychip.model.init import tensor_seed
from anychip.parallel.processes import Processes
from anychip.plan.saved import predicted_rate
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.train.checkpoint import CheckpointInfo
from anychip.train.checkpoint.directory import complete_steps, read_manifest, step_name
from anychip.train.heartbeat import Heartbeat
from anychip.train.job import TrainingJob
from anychip.train.loop import run_training

DISTANCE_TOKENS = 512


@dataclass(frozen=True)
class GrowingRun:
    """A run whose recipe has a `grow` section. `whole` is the job as it would be without growth."""

    recipe: Recipe
    run: RunDirectory
    whole: TrainingJob

    def train(self) -> int:
        """Train all models in turn, from where the run stands; returns the last step."""
        self.check()
        for number in range(self.current(), len(self.recipe.models)):
            if number:
                self.grow(number - 1)
            step = run_training(self.job(number))
            gc.collect()  # the model's memory, before the larger one's is taken
        return step

    def check(self) -> None:
        """Raise InputError for growth that cannot be, before anything is trained."""
        for number, growth in enumerate(self.recipe.grow):
            grown_config(self.recipe.models[number], dict(growth.to))
        steps = [*self.recipe.growth_steps, self.recipe.training.steps]
        for number, growth in enumerate(self.recipe.grow[:-1]):
            if growth.mode == "masked" and steps[number + 1] - steps[number] < growth.open_steps:
                raise InputError(
                    f"grow: growth {number + 1} begins {steps[number + 1] - steps[number]} steps after growth "
                    f"{number}, whose masks open over {growth.open_steps}.",
                    do=f"Lower grow.{number}.open_steps, or let growth {number + 1} begin later.",
                )

    def current(self) -> int:
        """The last model that has a checkpoint, or the first."""
        numbers = range(len(self.recipe.models))
        return max((n for n in numbers if complete_steps(self.run.model_checkpoints(self.recipe, n))), default=0)

    def job(self, number: int) -> TrainingJob:
        """The training of one model."""
        checkpoints = self.run.model_checkpoints(self.recipe, number)
        lineage = newest_lineage(checkpoints)
        growing = None
        if number:
            own = lineage[-number:]  # there may be some before this run
            *earlier, (plan, at) = [(plan_of_record(entry["growth"]), int(entry["step"])) for entry in own]
            growing = Growing(plan, self.recipe.grow[number - 1], at, tuple(earlier))
        last = number == len(self.recipe.grow)
        return replace(
            self.whole,
            model=self.recipe.models[number],
            identity=sha256_json([self.whole.identity, number]),
            until=None if last else self.recipe.growth_steps[number],
            checkpoints=checkpoints,
            growing=growing,
            lineage=lineage,
            predicted=self._predicted(number),
        )

    def _predicted(self, number: int) -> float | None:
        """Tokens a second and device of this model by the plan kept with the run."""
        alone = self.recipe.model_copy(update={"model": self.recipe.models[number], "grow": []})
        return predicted_rate(alone, self.run.plan, int(os.environ.get("WORLD_SIZE", "1")))

    def grow(self, number: int) -> None:
        """Make the next model's first checkpoint out of this model's last one, unless it is there."""
        target = self.run.model_checkpoints(self.recipe, number + 1)
        if complete_steps(target):
            return
        heartbeat = Heartbeat.of_environment(step=self.recipe.growth_steps[number])
        processes = ranks(self.whole.parallel)
        heartbeat.beat("grow")
        with heartbeat.listening(processes.layout.describe() if processes else ""):
            self._grow(number, target, processes)
        heartbeat.close()

    def _grow(self, number: int, target: Path, processes: Processes | None) -> None:
        started = time.monotonic()
        store = open_store(self.run.model_checkpoints(self.recipe, number), processes)
        info = store.open(self.recipe.growth_steps[number])
        texts = self.texts()
        plan = make_plan(self.recipe, number, info, texts)
        extra = kept_extra(info)
        extra |= {"identity": sha256_json([self.whole.identity, number + 1])}
        stream = Stream(info, plan, target, extra)
        proof = grow_together(stream, texts, processes)
        if proof is not None:
            seconds = round(time.monotonic() - started, 3)
            keep_record(self.run.growth(number), stream, proof, self.recipe, seconds)
            print(f"grow: {'; '.join(plan.operators())}")
            print(f"grow: {proof.sentence()}; {seconds:.1f} s", flush=True)

    def texts(self) -> dict[str, Tensor]:
        """Held-out text, as one sequence."""
        return held_out_text(self.recipe, self.run)


def held_out_text(recipe: Recipe, run: RunDirectory) -> dict[str, Tensor]:
    if not recipe.data.validation_fraction:
        return {}
    length = min(DISTANCE_TOKENS, recipe.training.seq_length)
    for batch, _ in validation_batches(run, recipe, 1, length):
        return {"text": batch.input_ids[0, :length]}
    return {}


def make_plan(recipe: Recipe, number: int, info: CheckpointInfo, texts: Mapping[str, Tensor]) -> GrowthPlan:
    """The plan of the recipe's growth of this number; where layers stand by distance, it is measured here."""
    old, growth = recipe.models[number], recipe.grow[number]
    distances = None
    if growth.layers == "distance":
        rows = CheckpointRows(info.path, info.manifest)
        tokens = texts.get("text")
        if tokens is None:
            raise InputError("grow: layers by distance are measured on held-out text, and there is none.",
                             do="Set data.validation_fraction, or layers: even.")  # fmt: skip
        distances = forward_by_layer(old, reader(old, rows), tokens, torch.float32).distances
        rows.close()
    return plan_growth(old, growth, tensor_seed(recipe.seed, f"growth {number}"), distances)


def newest_lineage(checkpoints: Path) -> list[dict[str, Any]]:
    """The growths behind the newest checkpoint here."""
    steps = complete_steps(checkpoints)
    extra: dict[str, Any] = read_manifest(checkpoints / step_name(steps[-1])).extra if steps else {}
    return list(extra.get("lineage", []))


def keep_record(folder: Path, stream: Stream, proof: Proof, recipe: Recipe, seconds: float) -> None:
    """growth.json, for people and for the report."""
    tokens = stream.source.step * recipe.training.global_batch_size * recipe.training.seq_length
    record = {
        "step": stream.source.step,
        "tokens": tokens,
        "parent": stream.parent_digest,
        "growth": stream.plan.as_record(),
        "proof": proof.as_record(),
        "seconds": seconds,
    }
    write_json(folder / "growth.json", record)
