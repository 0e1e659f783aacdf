"""Answers by the model that is being trained, judged and compared with what training makes of them.

The processes share the questions out: each, or all that share matrices (tensor parallel) together, puts the weights
together, answers its questions and judges them; then all know all answers. What is drawn depends on (seed, step,
question, answer) alone. So after a stop the answers of a step are made again, from the same weights and with the same
draws; only where several updates learn from the same answers (`iterations`) are these kept on disk, since the weights
that wrote them are gone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.errors import InputError, UnfitError
from anychip.files import atomic_writer, write_json
from anychip.model.lora import adapter_shapes, is_adapter, merged
from anychip.parallel.tensor import local, whole
from anychip.recipe.schema import GrpoConfig, LoraConfig
from anychip.train.checkpoint.directory import complete_steps
from anychip.train.engine import Engine
from anychip.tune.collate import padded
from anychip.tune.encoding import EncodedDialog
from anychip.tune.grpo import GrpoData
from anychip.tune.policy import divergence, group_advantages
from anychip.tune.rewards import Answered, Reward
from anychip.tune.sampler import Asked, Said, Sampler

_SHOWN_ANSWERS = 16


class Rollouts:
    """The answers of each step; what the training loop calls before it learns from them."""

    def __init__(
        self,
        data: GrpoData,
        reward: Reward,
        sampler: Sampler,
        folder: Path,
        seed: int,
        checkpoints: Path,
        reference: Engine | None = None,
        show_interval: int = 10,
    ) -> None:
        """`reference` is the frozen model that tuning started from; None: not compared with. `checkpoints` are the
        job's own. Some answers of every `show_interval`-th step are written to `folder`/answers for people to read."""
        self._data, self._reward, self._sampler, self._seed = data, reward, sampler, seed
        self._config: GrpoConfig = data.config
        self._checkpoints = checkpoints
        self._folder, self._reference, self._show_interval = folder, reference, show_interval
        self._newest: tuple[int, Batch, Mapping[str, float]] | None = None
        self.crew = 0
        """How many neighbouring processes answer together; 0 before they have answered."""

    def answer(self, engine: Engine, batch: Batch, step: int) -> tuple[Batch, Mapping[str, float]]:
        """The questions of `step` (from 0) with answers to learn from. Called by all processes together; raises
        UnfitError where the sampler and training disagree about the probabilities of answers."""
        first = step - step % self._config.iterations
        if step == first:
            self._newest = (first, *self._make(engine, first))
            if self._config.iterations > 1 and engine.processes.is_first:
                self._keep(*self._newest)
            engine.processes.barrier()
        elif self._newest is None or self._newest[0] != first:
            self._newest = (first, *self._kept(first))
        return self._newest[1:]

    def _make(self, engine: Engine, step: int) -> tuple[Batch, Mapping[str, float]]:
        said, scores = self._sample(engine, step)
        batch, drawn = self._rows(self._data.numbers(step), said)
        sampled = engine.token_log_probabilities(batch)
        learned = batch.labels != IGNORE_LABEL
        differences = (sampled[learned].double() - drawn).abs()
        self._compare(differences, step)
        reference = None if self._reference is None else self._reference.token_log_probabilities(batch)
        totals = torch.tensor([self._reward.total(row) for row in scores.tolist()], dtype=torch.float64)
        advantages = group_advantages(totals, self._config.group_size, scale=self._config.scale_rewards)
        eos = self._data.tokenizer.eos_id
        measured = {
            "reward": float(totals.mean()),
            "success": float((scores[:, 0] >= 1).double().mean()),
            "answer_tokens": float(learned.sum(1).double().mean()),
            "ended": sum(one.tokens[-1] == eos for one in said) / len(said),
            "logprob_difference": float(differences.mean()),
            "logprob_difference_max": float(differences.max()),
        }
        if reference is not None:
            measured["kl"] = float(divergence(sampled[learned], reference[learned]).mean())
        if engine.processes.is_first and (step + 1) % self._show_interval == 0:
            self._show(step, said, scores)
        return Batch(batch.input_ids, batch.labels, None, reference, sampled, advantages), measured

    def _sample(self, engine: Engine, step: int) -> tuple[list[Said], Tensor]:
        """All answers of a step, each with its scores [answers, rewards]; every crew makes its share."""
        numbers, group, longest = self._data.numbers(step), self._config.group_size, self._config.max_new_tokens
        processes = engine.processes
        self.crew = self.crew or self._sampler.join(processes)
        self._sampler.load(whole_weights(engine, self._config.lora))
        crew, crews = processes.rank // self.crew, processes.layout.world_size // self.crew
        mine = [place * group + number for place in range(crew, len(numbers), crews) for number in range(group)]
        asked = [Asked(self._data.prompts[numbers[row // group]], f"grpo:{step}:{row}") for row in mine]
        said = self._sampler.sample(asked, self._seed, longest)
        shape = (len(numbers) * group, longest)
        tokens = torch.zeros(shape, dtype=torch.int64)
        log_probabilities = torch.zeros(shape, dtype=torch.float32)
        scores = torch.zeros(shape[0], len(self._reward.scores), dtype=torch.float32)
        for row, answer in zip(mine if processes.rank % self.crew == 0 else [], said, strict=True):
            tokens[row, : len(answer.tokens)] = torch.tensor(answer.tokens) + 1  # 0: no token
            log_probabilities[row, : len(answer.tokens)] = torch.tensor(answer.log_probabilities)
            scores[row] = torch.tensor(self._reward.all(self._judged(numbers[row // group], answer)))
        tokens, log_probabilities, scores = (
            processes.sum(part.to(processes.device)).cpu() for part in (tokens, log_probabilities, scores)
        )
        lengths = (tokens > 0).sum(1).tolist()
        rows = zip(tokens.tolist(), log_probabilities.tolist(), lengths, strict=True)
        return [Said([token - 1 for token in row[:count]], drawn[:count]) for row, drawn, count in rows], scores

    def _judged(self, task_number: int, said: Said) -> Answered:
        return self._data.judged(self._data.tasks[task_number], said.tokens)

    def _rows(self, numbers: list[int], said: list[Said]) -> tuple[Batch, Tensor]:
        """Questions with their answers, and the sampler's log-probabilities of the latter, one behind the other."""
        rows = []
        for number, answer in enumerate(said):
            prompt = self._data.prompts[numbers[number // self._config.group_size]]
            tokens = np.array([*prompt, *answer.tokens], dtype=np.int32)
            labels = tokens[1:].copy()
            labels[: len(prompt) - 1] = IGNORE_LABEL
            rows.append(EncodedDialog(tokens[:-1], labels))
        drawn = torch.tensor([value for answer in said for value in answer.log_probabilities], dtype=torch.float64)
        return padded(rows, self._config.seq_length, self._data.tokenizer), drawn

    def _compare(self, differences: Tensor, step: int) -> None:
        mean, limit = float(differences.mean()), self._config.largest_difference
        if not mean <= limit:  # also for one that is no number
            raise UnfitError(
                f"log-probabilities of the sampler and of training differ by {mean:.3g} nats a token on the mean "
                f"(largest {float(differences.max()):.3g}); the limit is {limit:g}. Learning from such answers would "
                "not be what the method says.",
                where=f"grpo, step {step + 1}",
                do="Look for a wrong conversion of weights or precision, or raise tune.grpo.largest_difference.",
            )

    def _show(self, step: int, said: list[Said], scores: Tensor) -> None:
        """Some answers for people to read."""
        numbers, shown = self._data.numbers(step), []
        for row in range(min(_SHOWN_ANSWERS, len(said))):
            judged = self._judged(numbers[row // self._config.group_size], said[row])
            shown.append(
                {
                    "question": judged.question,
                    "reference": judged.reference,
                    "answer": judged.answer,
                    "scores": scores[row].tolist(),
                }
            )
        write_json(self._folder / "answers" / f"step-{step + 1}.json", {"step": step + 1, "answers": shown})

    # Kept for the updates that learn from the same answers

    def _keep(self, step: int, batch: Batch, measured: Mapping[str, float]) -> None:
        from safetensors.torch import save

        tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
        held = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        with atomic_writer(self._place(step)) as handle:
            handle.write(save(held, {"measured": json.dumps(dict(measured))}))
        forget_rollouts(self._place(step).parent, self._checkpoints, self._config.iterations)

    def _kept(self, step: int) -> tuple[Batch, Mapping[str, float]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(self._place(step)), framework="pt") as handle:
                tensors: dict[str, Any] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                measured = json.loads(handle.metadata()["measured"])
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(
                f"the answers of step {step + 1} are not there any more ({error}).",
                where=self._place(step),
                do="Remove the checkpoints of this stage to tune from the beginning.",
            ) from None
        return Batch(**tensors), measured

    def _place(self, step: int) -> Path:
        return self._folder / "rollouts" / f"step-{step + 1}.safetensors"


def forget_rollouts(folder: Path, checkpoints: Path, iterations: int) -> None:
    """Remove the answers that were learned from before the newest checkpoint: nobody starts there again."""
    newest = max(complete_steps(checkpoints), default=0)
    for path in folder.glob("step-*.safetensors"):
        if int(path.stem.removeprefix("step-")) - 1 + iterations <= newest:
            path.unlink(missing_ok=True)


def whole_weights(engine: Engine, lora: LoraConfig | None) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors put together from all processes, adapters merged in, one at a time. Called, and read to the
    end, by all of them together."""

    def gathered(name: str) -> Tensor:
        parameter = engine.parameters[name]
        return whole(local(parameter.detach()), parameter)

    for name in engine.parameters:
        if is_adapter(name):
            continue
        weight = gathered(name)
        if lora is not None:
            a, b = adapter_shapes(name, (0, 0), lora.rank) if name.endswith(".weight") else ("", "")
            if a in engine.parameters:
                weight = merged(weight, gathered(a), gathered(b), lora.alpha / lora.rank)
        yield name, weight
