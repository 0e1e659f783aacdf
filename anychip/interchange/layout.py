"""Between logical tensors and published ones: keys and values are interleaved per head, experts are told apart, rows
that turn lie in pairs, multipliers are taken in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from anychip.families.published import PublishedTensor
from anychip.recipe.schema import ModelConfig

Read = Callable[[str], Tensor]


def to_published(config: ModelConfig, tensor: PublishedTensor, parts: Sequence[Tensor]) -> Tensor:
    """The published tensor from its logical parts (`tensor.logical` order; of an expert's tensor, all experts')."""
    if len(parts) == 2:
        heads, dim = config.num_key_value_heads, config.head_dim
        keys, values = (part.view(heads, 1, dim, -1) for part in parts)
        return torch.cat((keys, values), dim=1).view(tensor.shape)
    if not parts:
        return torch.zeros(tensor.shape)
    (data,) = parts
    if tensor.expert is not None:
        data = data[tensor.expert]
    if tensor.turned is not None:
        data = _turned_rows(data, *tensor.turned, paired=True)
    return data if tensor.factor == 1.0 else data * tensor.factor


def to_logical(config: ModelConfig, tensor: PublishedTensor, data: Tensor) -> Mapping[str, Tensor]:
    """Logical parts by name from a published tensor; of an expert's tensor, this expert's part."""
    if len(tensor.logical) == 2:
        split = data.view(config.num_key_value_heads, 2, config.head_dim, -1)
        return {name: split[:, index].reshape(-1, data.shape[1]) for index, name in enumerate(tensor.logical)}
    if tensor.turned is not None:
        data = _turned_rows(data, *tensor.turned, paired=False)
    return dict.fromkeys(tensor.logical, data)


def _turned_rows(data: Tensor, head: int, first: int, *, paired: bool) -> Tensor:
    """The rows of each head from `first` on: from halves (0, 1, 2, ...) to pairs (0, n / 2, 1, ...), or back."""
    heads = data.view(-1, head, data.shape[1])
    still, turning = heads[:, :first], heads[:, first:]
    count, rows, columns = turning.shape
    shape = (count, 2, rows // 2, columns) if paired else (count, rows // 2, 2, columns)
    moved = turning.reshape(shape).transpose(1, 2).reshape(count, rows, columns)
    return torch.cat((still, moved), dim=1).view(data.shape)


def logical_tensors(
    config: ModelConfig, tensors: Iterable[PublishedTensor], read: Read
) -> Iterator[tuple[str, Tensor]]:
    """Logical tensors by name, each from the published ones that it is made of; one (or all experts' one) in memory at
    a time."""
    gathered: list[Tensor] = []
    for tensor in tensors:
        if tensor.repeats:
            continue
        for name, part in to_logical(config, tensor, read(tensor.name)).items():
            if tensor.expert is None:
                yield name, part
                continue
            gathered.append(part)
            if len(gathered) == config.n_routed_experts:
                yield name, torch.stack(gathered)
                gathered = []


def remembering(read: Read) -> Read:
    """`read` that keeps the last tensor: all experts' tensor is asked for once an expert."""
    last: dict[str, Tensor] = {}

    def again(name: str) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = read(name)
        return last[name]

    return again
