"""Between logical tensors and published ones: only keys and values change shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anychip.families.telechat2 import PublishedTensor
from anychip.recipe.schema import ModelConfig


def to_published(config: ModelConfig, tensor: PublishedTensor, parts: Sequence[Tensor]) -> Tensor:
    """The published tensor from its logical parts (`tensor.logical` order)."""
    if len(parts) == 1:
        return parts[0]
    heads, dim = config.num_key_value_heads, config.head_dim
    keys, values = (part.view(heads, 1, dim, -1) for part in parts)
    return torch.cat((keys, values), dim=1).view(tensor.shape)


def to_logical(config: ModelConfig, tensor: PublishedTensor, data: Tensor) -> Mapping[str, Tensor]:
    """Logical parts by name from a published tensor."""
    if len(tensor.logical) == 1:
        return {tensor.logical[0]: data}
    split = data.view(config.num_key_value_heads, 2, config.head_dim, -1)
    return {name: split[:, index].reshape(-1, data.shape[1]) for index, name in enumerate(tensor.logical)}
