"""Tuning by rewards: which questions a step asks, and how."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.data.tokenizer import load_tokenizer
from anychip.errors import InputError
from anychip.families.templates import render
from anychip.recipe import Recipe
from anychip.recipe.schema import GrpoConfig
from anychip.rundir import RunDirectory
from anychip.tune.collate import judge_too_long
from anychip.tune.epochs import Epochs, PaddedRows
from anychip.tune.rewards import Answered
from anychip.tune.tasks import Task, load_tasks, split_tasks


class GrpoData:
    """The questions of `tune.grpo`, step by step, a pure function of the recipe, the seed and the step. A batch holds
    questions alone: answers need weights."""

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        """Raises InputError for a recipe without `tune.grpo`, unreadable sources, or questions that are too long."""
        self.config = grpo_config(recipe)
        self.tokenizer = load_tokenizer(run.tokenizer)
        self._template = recipe.tune.template
        split = split_tasks(load_tasks(self.config.sources, self.config.system_prompt))
        room = self.config.seq_length - self.config.max_new_tokens
        encoded = [(task, self.prompt(task)) for task in split.training]
        fitting = [(task, prompt) for task, prompt in encoded if len(prompt) <= room]
        paths = ", ".join(source.path for source in self.config.sources)
        judge_too_long(len(encoded) - len(fitting), len(fitting), "question", room, self.config.too_long, paths)
        self.tasks: list[Task] = [task for task, _ in fitting]
        self.prompts: list[list[int]] = [prompt for _, prompt in fitting]
        held_out = [task for task in split.held_out if len(self.prompt(task)) <= room]
        wanted = min(self.config.held_out_questions, len(held_out))
        self.held_out = [held_out[number * len(held_out) // wanted] for number in range(wanted)]
        numbers: dict[str, int] = {}
        subjects = np.array([numbers.setdefault(task.dialog.subject, len(numbers)) for task in self.tasks])
        weights = [source.weight for source in self.config.sources]
        epochs = Epochs(subjects, recipe.seed, np.array([task.dialog.source for task in self.tasks]), weights)
        questions = self.config.global_batch_size // self.config.group_size
        self._rows = PaddedRows(epochs, np.array([len(prompt) for prompt in self.prompts]), questions, recipe.seed)

    def prompt(self, task: Task) -> list[int]:
        """A question's ids, up to where the answer begins."""
        dialog, special = task.dialog, self.tokenizer.special_tokens
        parts = render(dialog.messages, special, self._template, dialog.tools, prompt=True)
        return self.tokenizer.encode_parts(part.value for part in parts)

    def judged(self, task: Task, answer: Sequence[int]) -> Answered:
        """An answer's tokens as rewards see them."""
        return Answered(self.tokenizer.decode(answer), task.dialog.question, task.reference, task.tests)

    def numbers(self, step: int) -> list[int]:
        """The tasks whose answers `step` (from 0) learns from."""
        return [int(row[0]) for row in self._rows.rows(step // self.config.iterations)]

    def batch(self, step: int) -> Batch:
        """Each question of a step as often as it is answered: [global_batch_size, longest], nothing to learn."""
        import torch

        prompts = [self.prompts[number] for number in self.numbers(step) for _ in range(self.config.group_size)]
        input_ids = torch.full((len(prompts), max(map(len, prompts))), self.tokenizer.eos_id)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = torch.tensor(prompt)
        return Batch(input_ids, torch.full_like(input_ids, IGNORE_LABEL))

    def documents(self, step: int) -> list[str]:
        """The first words of the questions of a step."""
        return list(dict.fromkeys(self.tasks[number].dialog.question[:80] for number in self.numbers(step)))


def grpo_config(recipe: Recipe) -> GrpoConfig:
    """The recipe's `tune.grpo`. Raises InputError when it has none."""
    if recipe.tune.grpo is None:
        raise InputError("the recipe has no section tune.grpo.", do="Add it: sources and rewards are enough.")
    return recipe.tune.grpo
