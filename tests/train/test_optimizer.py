"""Optimizer, Muon and schedules against their definitions."""

from __future__ import annotations

import torch

from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe.schema import ModelConfig, OptimizerConfig, ScheduleConfig
from anychip.train.muon import orthogonalize
from anychip.train.optimizer import Optimizer
from anychip.train.schedule import lr_share

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def decoder() -> Decoder:
    model = Decoder(CONFIG)
    init_parameters(model, CONFIG, 0)
    return model


def test_orthogonalize_keeps_directions_and_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT.contiguous()):
        result = orthogonalize(shaped)
        left, values, right = torch.linalg.svd(shaped, full_matrices=False)
        assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.35
        mixed = left.mT @ result @ right.mT
        assert (mixed - torch.diag_embed(mixed.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
        assert values.shape == (3, 8)


def test_muon_takes_the_layers_matrices_and_adamw_everything_else() -> None:
    model = decoder()
    state = Optimizer(dict(model.named_parameters()), OptimizerConfig(name="muon"), torch.float32).state()
    for name, parameter in model.named_parameters():
        by_muon = name.startswith("layers.") and parameter.ndim == 2
        assert (f"momentum.{name}" in state) == by_muon
        assert (f"exp_avg.{name}" in state) != by_muon


def test_adamw_follows_its_definition_and_spares_vectors_from_decay() -> None:
    model = decoder()
    config = OptimizerConfig(weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8)
    optimizer = Optimizer(dict(model.named_parameters()), config, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step(0.1)
    for name, parameter in model.named_parameters():
        decay = 0.5 if parameter.ndim >= 2 else 0.0  # the first bias-corrected update is the gradient's sign
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * decay) - 0.1, rtol=1e-5, atol=1e-6)


def test_schedules_rise_hold_and_fall_as_they_say() -> None:
    cosine = ScheduleConfig(kind="cosine", warmup_steps=10, min_lr_fraction=0.1)
    shares = [lr_share(cosine, step, 100) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1.0 and shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True) and 0.1 < shares[-1] < 0.11
    wsd = ScheduleConfig(kind="wsd", warmup_steps=5, decay_fraction=0.5, min_lr_fraction=0.0)
    assert [lr_share(wsd, step, 20) for step in (5, 10, 15, 19)] == [1.0, 1.0, 0.5, 0.09999999999999998]
    constant = ScheduleConfig(kind="constant", warmup_steps=0)
    assert {lr_share(constant, step, 9) for step in range(9)} == {1.0}
