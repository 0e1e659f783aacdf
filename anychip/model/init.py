"""Initial values: a function of (seed, logical name) alone, so that any layout starts from the same model."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from anychip.model.arithmetic import Shape, parameter_shapes
from anychip.recipe.schema import ModelConfig


def tensor_seed(seed: int, name: str) -> int:
    """63 bits from the run's seed and a tensor's logical name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big") >> 1


def init_tensor(name: str, shape: Shape, config: ModelConfig, seed: int) -> Tensor:
    """One fp32 parameter on the CPU: norms 1, biases 0, matrices normal with `initializer_range`.

    The two projections that write into the residual stream are divided by sqrt(2 * num_hidden_layers), which keeps the
    stream's variance independent of depth (GPT-2, section 2.3).
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if len(shape) == 3:
        return init_experts(name, range(shape[0]), shape[1:], config, seed)
    return _normal(name, shape, config, tensor_seed(seed, name))


def init_experts(name: str, experts: range, shape: Shape, config: ModelConfig, seed: int) -> Tensor:
    """Matrices [len(experts), *shape] of some experts of the parameter `name`. Each has a seed of its own, so that no
    process makes more than it holds."""
    return torch.stack([_normal(name, shape, config, tensor_seed(seed, f"{name}.{expert}")) for expert in experts])


def _normal(name: str, shape: Shape, config: ModelConfig, seed: int) -> Tensor:
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * config.num_hidden_layers) ** 0.5
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


def init_parameters(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill a decoder's parameters in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, shape in parameter_shapes(config):
            parameters[name].copy_(init_tensor(name, shape, config, seed))
