"""How many held-out questions a model answers rightly before and after tuning by rewards."""

from __future__ import annotations

import math
from typing import Any

from anychip.recipe.schema import GrpoConfig
from anychip.train.checkpoint import CheckpointStore
from anychip.tune.grpo import GrpoData
from anychip.tune.rewards import Reward
from anychip.tune.sampler import Asked, Sampler

_EXAMPLES = 5


def measure_success(
    data: GrpoData, reward: Reward, sampler: Sampler, before: CheckpointStore, after: CheckpointStore
) -> dict[str, Any]:
    """The record of both: share of questions whose likeliest answer the first reward scores 1 or more, its standard
    error, and the first few answers. Called by all processes that answer together; the first one's record counts."""
    record: dict[str, Any] = {"questions": len(data.held_out), "trained_questions": len(data.tasks)}
    for name, store in (("before", before), ("after", after)):
        record[name] = _measure(data, data.config, reward, sampler, store)
    return record


def _measure(
    data: GrpoData, config: GrpoConfig, reward: Reward, sampler: Sampler, store: CheckpointStore
) -> dict[str, Any]:
    newest = store.latest()
    assert newest is not None, "tuning has started from one and ended in the other"
    names = [name for name in newest.tensors if name.startswith("model.")]
    sampler.load((name.removeprefix("model."), tensor) for name, tensor in store.read(newest, names))
    asked = [Asked(data.prompt(task), f"held out:{number}") for number, task in enumerate(data.held_out)]
    said = sampler.sample(asked, 0, config.max_new_tokens, greedy=True)
    if not said:
        return {}
    judged = [data.judged(task, one.tokens) for task, one in zip(data.held_out, said, strict=True)]
    right = [reward.all(one)[0] >= 1 for one in judged]
    share = sum(right) / len(right)
    return {
        "step": newest.step,
        "success": share,
        "standard_error": math.sqrt(share * (1 - share) / max(1, len(right) - 1)),
        "answers": [
            {"question": one.question, "reference": one.reference, "answer": one.answer, "right": ok}
            for one, ok in list(zip(judged, right, strict=True))[:_EXAMPLES]
        ],
    }
