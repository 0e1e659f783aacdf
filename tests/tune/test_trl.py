"""Losses and gradients against TRL's own code on the same batch, in fp32. Skipped where TRL is not installed:

pip install --no-deps --target /tmp/trl trl pandas datasets dill multiprocess xxhash pytz python-dateutil
PYTHONPATH=/tmp/trl pytest tests/tune/test_trl.py
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from test_policy import LONGEST, sampled_batch

from anychip.data.batch import Batch
from anychip.train.objective import Head, Objective
from anychip.tune.policy import Normalization, Policy, group_advantages
from anychip.tune.preference import Loss, Preference

pytest.importorskip("trl")
LOSS_TYPES: dict[Normalization, str] = {"sequence": "grpo", "token": "dapo", "length": "dr_grpo"}


def plain_log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.t()
    return logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2) * (labels != -100)


def trainer(**settings: Any) -> Any:
    """What TRL's loss functions ask of their trainer, for one process and one micro-batch."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
        gather_for_metrics=lambda x: x,
    )  # fmt: skip
    quiet = {"aux_loss_enabled": False, "_metrics": defaultdict(lambda: defaultdict(list)), "accelerator": accelerator}
    return MagicMock(**{**quiet, "model": SimpleNamespace(training=True), **settings})


def compare(objective: Objective, batch: Batch, hidden: torch.Tensor, weight: torch.Tensor, theirs: Any) -> None:
    """Loss and gradients of both, to 1e-5 of the largest."""
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = theirs(*exact)
    expected.backward()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = objective.loss(Head(ours[1], 3), ours[0], batch) / objective.size(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for mine, other in zip(ours, exact, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert (mine.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max()


@pytest.mark.parametrize("normalization", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_policy_loss_is_that_of_trl(normalization: Normalization, beta: float) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    hidden, weight, exact = sampled_batch(torch.float32)
    assert exact.sampled is not None and exact.reference is not None and exact.advantages is not None
    batch = Batch(
        exact.input_ids, exact.labels, None, exact.reference.float(), exact.sampled.float(), exact.advantages.float()
    )
    mask = (batch.labels != -100).long()

    def theirs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        now = plain_log_probabilities(hidden, weight, batch.labels)
        self = trainer(
            loss_type=LOSS_TYPES[normalization], beta=beta, epsilon_low=0.2, epsilon_high=0.28,
            importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            use_vllm=False, max_completion_length=LONGEST, current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros_like(now), None),
        )  # fmt: skip
        inputs = {
            "prompt_ids": batch.input_ids[:, :0], "prompt_mask": mask[:, :0], "completion_ids": batch.labels,
            "completion_mask": mask, "advantages": batch.advantages, "old_per_token_logps": batch.sampled,
            "ref_per_token_logps": batch.reference, "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        loss: torch.Tensor = GRPOTrainer._compute_loss(self, None, inputs)
        return loss

    compare(Policy(0.2, 0.28, beta, normalization, LONGEST), batch, hidden, weight, theirs)


@pytest.mark.parametrize(("kind", "name"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_the_preference_loss_is_that_of_trl(kind: Loss, name: str) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    hidden, weight, exact = sampled_batch(torch.float32)
    reference = torch.linspace(-20, -12, 6)
    batch = Batch(exact.input_ids, exact.labels, None, reference)
    order = [0, 2, 4, 1, 3, 5]  # theirs has all chosen first
    labels = batch.labels[order]
    mask = torch.nn.functional.pad((labels != -100).long(), (1, 0))

    def theirs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        now = plain_log_probabilities(hidden[order], weight, labels)
        self = trainer(
            beta=0.3, loss_types=[name], loss_weights=[1.0], ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", label_smoothing=0.0,
            _total_train_tokens=0,
            _tp_size=1, use_weighting=False,
        )  # fmt: skip
        inputs = {
            "input_ids": mask, "completion_mask": mask, "attention_mask": mask, "ref_chosen_logps": reference[0::2],
            "ref_rejected_logps": reference[1::2],
        }  # fmt: skip
        logged = torch.zeros_like(now)
        outputs = SimpleNamespace(log_probs=now, entropy=logged, mean_logits=logged, is_top1=logged.bool())
        loss: torch.Tensor = DPOTrainer._compute_loss(self, lambda **_: outputs, inputs, False)
        return loss

    compare(Preference(kind, 0.3), batch, hidden, weight, theirs)


def test_advantages_are_those_of_trl() -> None:
    from trl.trainer.utils import nanstd

    rewards = torch.randn(12, generator=torch.Generator().manual_seed(1))
    groups = rewards.view(-1, 4)
    spread = nanstd(groups, dim=1).repeat_interleave(4)
    expected = (rewards - groups.mean(1).repeat_interleave(4)) / (spread + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4, scale=True), expected)
