"""One run is one directory; this file knows where everything in it lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from anychip.errors import InputError
from anychip.files import write_json, write_text
from anychip.recipe import Recipe, dump_recipe, load_recipe

CHIP_PROFILE = "chip-profile.json"
TUNING_STAGES = ("sft", "dpo", "grpo")
"""Each keeps what it leaves in a folder of its name."""


def stage_before(recipe: Recipe, stage: str) -> str:
    """The stage whose weights a tuning stage begins with: the one before it that the recipe has."""
    earlier = TUNING_STAGES[: TUNING_STAGES.index(stage)]
    return next((name for name in reversed(earlier) if getattr(recipe.tune, name) is not None), "pretrain")


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside `runs/NAME`. Nothing is created until something is written."""

    root: Path

    @property
    def recipe_path(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def data(self) -> Path:
        """Cleaned documents, `tokenizer/`, packed `train/NAME.{bin,idx}` and `validation/NAME.{bin,idx}`."""
        return self.root / "data"

    @property
    def tokenizer(self) -> Path:
        return self.data / "tokenizer"

    @property
    def plan(self) -> Path:
        """What `anychip plan --save` predicted for this run's own layout; the training log shows it."""
        return self.root / "plan.json"

    @property
    def probe(self) -> Path:
        """What `anychip probe` measured: `probe.json`, `probe.html`, and progress to continue from."""
        return self.root / "probe"

    @property
    def chip_profile(self) -> Path:
        """Operators that `anychip probe` found wrong; training then takes the reference."""
        return self.root / CHIP_PROFILE

    @property
    def trace(self) -> Path:
        """What `anychip verify trace` recorded."""
        return self.root / "trace.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Pretraining checkpoints, `step-N/` each."""
        return self.root / "checkpoints"

    def stage_checkpoints(self, stage: str) -> Path:
        """Checkpoints of whole weights of a stage: `pretrain`, or one of `TUNING_STAGES`."""
        return self.checkpoints if stage == "pretrain" else self.root / stage / "checkpoints"

    def model_checkpoints(self, recipe: Recipe, number: int) -> Path:
        """Checkpoints of the recipe's model of this number (`recipe.models`): the last one's are `checkpoints`, those
        of the models that it grew from lie in `grow/NUMBER/checkpoints`."""
        return self.checkpoints if number == len(recipe.grow) else self.growth(number) / "checkpoints"

    def growth(self, number: int) -> Path:
        """What is kept of the model of this number before it grew, and the record of its growth."""
        return self.root / "grow" / str(number)

    @property
    def skipped(self) -> Path:
        """Ranges of batches that a rollback left out; absent when there were none."""
        return self.root / "skipped.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tb"

    @property
    def sft(self) -> Path:
        """Supervised tuning: `checkpoints/`, `logs/`, `tb/`, `data/` of its own."""
        return self.root / "sft"

    @property
    def dpo(self) -> Path:
        """Preference tuning, as `sft`."""
        return self.root / "dpo"

    @property
    def grpo(self) -> Path:
        """Tuning by rewards, as `sft`; with `success.json`, and `answers/` to read."""
        return self.root / "grpo"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval.json"

    @property
    def tasks(self) -> Path:
        """Results of the recipe's task files."""
        return self.root / "tasks.json"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def release(self) -> Path:
        """What `anychip release` gathers and signs, unless it is told another place."""
        return self.root / "release"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def stage_marker(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def read_recipe(self) -> Recipe:
        """The resolved recipe kept with the run."""
        if not self.recipe_path.is_file():
            raise InputError("is not a run directory: it holds no recipe.yaml.", where=self.root, do="Give runs/NAME.")
        return load_recipe(self.recipe_path)

    def write_recipe(self, recipe: Recipe) -> None:
        write_text(self.recipe_path, dump_recipe(recipe))

    def finished(self, stage: str) -> dict[str, object] | None:
        """What `finish` recorded for this stage, or None when it has not ended."""
        path = self.stage_marker(stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, stage: str, record: dict[str, object]) -> None:
        write_json(self.stage_marker(stage), record)
