"""A mixture of experts computes what a loop over tokens and experts computes, gradients too, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_models import SIGMOID, SOFTMAX, random_decoder, some_tokens
from torch import Tensor

from anychip.model.experts import MixtureOfExperts, Router
from anychip.model.layers import MLP
from anychip.model.remake import Remake
from anychip.recipe.schema import ModelConfig

NEAR = {"rtol": 1e-10, "atol": 1e-12}


def layer_of(model: dict[str, Any], **changes: Any) -> MixtureOfExperts:
    layer = random_decoder(ModelConfig(**{**model, **changes})).layers[-1].mlp
    assert isinstance(layer, MixtureOfExperts)
    return layer


def by_loop(layer: MixtureOfExperts, x: Tensor, kept: set[tuple[int, int]] | None = None) -> Tensor:
    """Token by token, expert by expert, in the words of the papers. `kept`: (token, expert) pairs that count."""
    config, rows = layer.config, x.flatten(0, 1)
    answers = []
    for token, row in enumerate(rows):
        logits = layer.gate.weight @ row
        scores = torch.softmax(logits, 0) if config.scoring_func == "softmax" else 1 / (1 + torch.exp(-logits))
        bias = layer.gate.e_score_correction_bias
        ranked = scores if bias is None else scores + bias
        chosen = sorted(range(len(scores)), key=lambda e: -float(ranked[e].detach()))[: config.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else torch.tensor(1.0)
        answer = torch.zeros_like(row)
        for e in chosen:
            if kept is None or (token, e) in kept:
                answer = answer + config.routed_scaling_factor * scores[e] / total * one_expert(layer, e, row)
        if layer.shared_experts is not None:
            answer = answer + swiglu(layer.shared_experts, row)
        answers.append(answer)
    return torch.stack(answers).view_as(x)


def one_expert(layer: MixtureOfExperts, e: int, row: Tensor) -> Tensor:
    experts = layer.experts
    inner = F.silu(experts.gate_proj.weight[e] @ row) * (experts.up_proj.weight[e] @ row)
    out = experts.down_proj.weight[e] @ inner
    return out if experts.down_proj.bias is None else out + experts.down_proj.bias[e]


def swiglu(mlp: MLP, row: Tensor) -> Tensor:
    out = mlp.down_proj.weight @ (F.silu(mlp.gate_proj.weight @ row) * (mlp.up_proj.weight @ row))
    return out if mlp.down_proj.bias is None else out + mlp.down_proj.bias


def gradients(layer: MixtureOfExperts, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Of a random weighing of the outputs, by name; the input's under x. A bias that only ranks has none here."""
    layer.zero_grad()
    x.grad = None
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    (out * weights).sum().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None and "correction" not in name}
    return {**found, "x": x.grad}


def states(layer: MixtureOfExperts, rows: int = 2, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, length, layer.config.hidden_size, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "softmax, biases": (SOFTMAX, {}),
    "softmax, as scored": (SOFTMAX, {"norm_topk_prob": False, "biases": "none"}),
    "softmax, shared": (SOFTMAX, {"n_shared_experts": 2}),
    "sigmoid, ranked by bias": (SIGMOID, {}),
    "one expert a token": (SIGMOID, {"num_experts_per_tok": 1}),
    "all experts": (SOFTMAX, {"num_experts_per_tok": 8}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_computes_what_a_loop_computes(variant: str) -> None:
    model, changes = VARIANTS[variant]
    layer = layer_of(model, **changes)
    x = states(layer)
    out, expected = layer(x), by_loop(layer, x)
    torch.testing.assert_close(out, expected, **NEAR)
    found, right = gradients(layer, out, x), gradients(layer, expected, x)
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, **NEAR, msg=lambda text, name=name: f"{name}: {text}")


def test_experts_without_tokens_get_zero_gradients() -> None:
    layer = layer_of(SIGMOID)
    with torch.no_grad():
        assert layer.gate.e_score_correction_bias is not None
        layer.gate.e_score_correction_bias[:3] = 100.0  # everyone chooses these
    x = states(layer)
    found = gradients(layer, layer(x), x)
    assert all(not found[f"experts.{name}.weight"][3:].any() for name in ("gate_proj", "up_proj", "down_proj"))
    assert found["experts.up_proj.weight"][:3].any()


def test_what_is_made_again_in_backward_gives_the_same_bits() -> None:
    layer = layer_of(SIGMOID)
    source = states(layer)

    def run(keep: bool) -> dict[str, Tensor]:
        x = source * 1.0
        out = layer(x, remake=None if keep else Remake(lambda: source * 1.0), keep=keep)
        return gradients(layer, out, source)

    kept, made = run(keep=True), run(keep=False)
    assert all(torch.equal(kept[name].clone(), made[name]) for name in kept)


def test_a_capacity_leaves_out_the_last_tokens_of_a_full_expert() -> None:
    layer = layer_of(SOFTMAX, moe_capacity_factor=0.8, biases="none")
    x = states(layer, rows=1, length=10)
    choice = layer.gate(x).experts
    limit = -int(-0.8 * choice.numel() // 8)
    taken: dict[int, list[int]] = {}
    for token, row in enumerate(choice.tolist()):
        for expert in row:
            taken.setdefault(expert, []).append(token)
    kept = {(token, expert) for expert, tokens in taken.items() for token in tokens[:limit]}
    assert len(kept) < choice.numel()  # some are left out, or this shows nothing
    out, expected = layer(x), by_loop(layer, x, kept)
    torch.testing.assert_close(out, expected, **NEAR)
    found, right = gradients(layer, out, x), gradients(layer, expected, x)
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, **NEAR)


def test_the_router_scores_bf16_states_in_fp32() -> None:
    """A difference that bf16 cannot show decides."""
    router = Router(ModelConfig(**{**SIGMOID, "num_experts_per_tok": 1}))
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2] = 1 / 32
        router.weight[5] = (1 + 2**-12) / 32
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias.zero_()
    chosen = router(torch.ones(1, 4, 32, dtype=torch.bfloat16))
    assert chosen.experts.flatten().tolist() == [5] * 4
    assert chosen.weights.dtype == torch.float32


def test_the_bias_gets_the_load_as_its_gradient() -> None:
    """Over micro-batches it adds up, and recomputation does not count twice."""
    layer = layer_of(SIGMOID)
    bias = layer.gate.e_score_correction_bias
    assert bias is not None
    for length in (5, 9):
        x = states(layer, length=length)
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    with torch.no_grad():
        experts = torch.cat([layer.gate(states(layer, length=n)).experts.flatten() for n in (5, 9)])
    assert bias.grad is not None and torch.equal(bias.grad, experts.bincount(minlength=8).to(bias.grad))


def test_balance_and_z_loss_are_what_the_papers_say() -> None:
    layer = layer_of(SIGMOID, router_aux_loss_coef=0.3, router_z_loss_coef=0.02)
    x = states(layer, rows=3)
    layer.gate.loss_scale = 0.5
    chosen = layer.gate(x)
    chosen.weights.sum().mul(0.0).backward()  # only the losses' own gradients
    found = layer.gate.weight.grad
    weight = layer.gate.weight.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in x.detach():
        logits = row @ weight.T
        scores = logits.sigmoid()
        share = (scores / scores.sum(1, keepdim=True)).mean(0)
        choices = (scores + layer.gate.e_score_correction_bias.detach()).topk(3).indices  # type: ignore[union-attr]
        often = choices.flatten().bincount(minlength=8).double() * 8 / choices.numel()
        total = total + 0.3 * (often * share).sum() + 0.02 * logits.logsumexp(1).square().mean()
    (0.5 * total).backward()
    torch.testing.assert_close(found, weight.grad, **NEAR)


def test_a_whole_model_learns_with_every_part_in_use() -> None:
    config = ModelConfig(**{**SIGMOID, "num_nextn_predict_layers": 1, "router_aux_loss_coef": 0.01})
    model = random_decoder(config)
    tokens = some_tokens(config)
    hidden = model(tokens)
    (further,) = model.further(hidden, tokens)
    (model.logits(hidden).logsumexp(-1).sum() + model.logits(further).logsumexp(-1).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
