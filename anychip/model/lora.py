"""Low-rank adapters (arXiv 2106.09685): beside a frozen matrix W a product B A of rank r, scaled by alpha / r.

A starts as torch's own layers do, B at zero, so that the adapted model starts as the model itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.model.decoder import Decoder
from anychip.model.init import tensor_seed
from anychip.model.layers import Adapter, Linear
from anychip.recipe.schema import LoraConfig

MARK = ".adapter."


def add_adapters(model: Decoder, config: LoraConfig) -> None:
    """Give the wanted matrices of every layer an adapter. Nothing else is learned once `freeze` was called."""
    for layer in model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, Linear) and name.rpartition(".")[2] in config.target_modules:
                module.adapter = Adapter(module, config.rank, config.alpha / config.rank)


def freeze(model: Decoder) -> None:
    """Only adapters take gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in f".{name}")


def adapter_shapes(name: str, weight_shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the adapter of the matrix `name` (which ends in .weight), [out, in]."""
    out_features, in_features = weight_shape
    module = name.removesuffix(".weight")
    return {f"{module}{MARK}a": (rank, in_features), f"{module}{MARK}b": (out_features, rank)}


def init_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """One fp32 matrix of an adapter on the CPU, a function of (seed, logical name): A uniform within 1 / sqrt(in)."""
    if name.endswith(".b"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(tensor_seed(seed, name))
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The matrix that computes what W and its adapter compute together, summed in fp64, in W's dtype."""
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)


def is_adapter(name: str) -> bool:
    return MARK in name
