"""The policy loss and its gradients against the paper's formula in fp64, token by token, without any of our code."""

from __future__ import annotations

import math

import pytest
import torch

from anychip.data.batch import Batch
from anychip.train.objective import Head
from anychip.tune.policy import Normalization, Policy, divergence, group_advantages

LONGEST = 9


def sampled_batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Hidden states, a head and answers of unequal lengths, off the policy that sampled them, so that both sides of
    the clip are met."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(6, 7, 16), random(50, 16) / 4
    labels = torch.randint(0, 50, (6, 7), generator=generator)
    labels[0, :4] = labels[3, 5:] = labels[4, 1:6] = -100
    now = (hidden @ weight.t()).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    batch = Batch(labels, labels, None, now + random(6, 7) / 4, now + random(6, 7) / 4, random(6))
    return hidden.to(dtype), weight.to(dtype), batch


def independent(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch, policy: Policy) -> torch.Tensor:
    """The mean loss over all answers."""
    assert batch.sampled is not None and batch.advantages is not None and batch.reference is not None
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(batch.labels)):
        losses = []
        for at in range(batch.labels.shape[1]):
            label = int(batch.labels[row, at])
            if label == -100:
                continue
            log_p = torch.log(torch.softmax(weight @ hidden[row, at], 0)[label])
            ratio, advantage = torch.exp(log_p - batch.sampled[row, at]), batch.advantages[row]
            clipped = min(max(float(ratio.detach()), 1 - policy.clip_low), 1 + policy.clip_high)
            gained = ratio * advantage
            if clipped * float(advantage) < float(gained.detach()):
                gained = clipped * advantage
            other = torch.exp(batch.reference[row, at]) / torch.exp(log_p)
            losses.append(-gained + policy.beta * (other - torch.log(other) - 1))
        tokens += len(losses)
        total = total + torch.stack(losses).sum() / (len(losses) if policy.normalization == "sequence" else 1)
    divisor = {"sequence": len(batch.labels), "token": tokens, "length": len(batch.labels) * LONGEST}
    return total / divisor[policy.normalization]


@pytest.mark.parametrize("normalization", ["sequence", "token", "length"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_losses_and_gradients_are_those_of_the_formula(
    normalization: Normalization, dtype: torch.dtype, tolerance: float, beta: float
) -> None:
    hidden, weight, batch = sampled_batch(torch.float64)
    policy = Policy(0.2, 0.28, beta, normalization, LONGEST)
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = independent(*exact, batch, policy)
    expected.backward()
    ours = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    loss = policy.loss(Head(ours[1], 3), ours[0], batch) / policy.size(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).abs().max() <= tolerance * theirs.grad.abs().max()


def test_advantages_compare_an_answer_with_its_group_alone() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    spread = math.sqrt(4 * 0.25 / 3) + 1e-4
    plain, scaled = (group_advantages(rewards, 4, scale=scale).tolist() for scale in (False, True))
    assert plain == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    assert scaled == pytest.approx([value / spread for value in plain])


def test_the_divergence_is_estimated_without_bias_and_never_below_zero() -> None:
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    estimates = divergence(p, q)
    assert float(estimates.min()) >= 0
    assert float((p.exp() * estimates).sum()) == pytest.approx(float((p.exp() * (p - q)).sum()))
