"""Muon: momentum whose direction is orthogonalised (Jordan et al. 2024; at scale: arXiv 2502.16982)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anychip.parallel.tensor import local, part_of, whole

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of [count, rows, columns] near 1 by a quintic Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon:
    """Updates matrices by name. Momentum is fp32; Newton-Schulz runs in `product_dtype`, equal shapes together.

    The update is scaled by 0.2 * sqrt(max(rows, columns)), which gives it the size of an AdamW update, so that both
    share one learning rate and weight decay (arXiv 2502.16982, section 2.2).
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], momentum: float, weight_decay: float, product_dtype: torch.dtype
    ) -> None:
        self.parameters, self.momentum, self.weight_decay = dict(parameters), momentum, weight_decay
        self.product_dtype = product_dtype
        self.momentum_buffers = {name: torch.zeros_like(parameter.detach()) for name, parameter in parameters.items()}
        self._by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            self._by_shape[parameter.shape].append(name)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """A direction depends on the whole matrix, so processes that share one gather it and keep their part."""
        for shape, names in self._by_shape.items():
            directions = torch.stack([self._direction(name) for name in names]).to(self.product_dtype)
            updates = orthogonalize(directions.flatten(0, -3)).view_as(directions)  # an expert's matrix is one of many
            scale = 0.2 * max(shape[-2:]) ** 0.5
            for name, update in zip(names, updates, strict=True):
                parameter = self.parameters[name]
                part = part_of(parameter, update)
                local(parameter.detach()).mul_(1 - lr * self.weight_decay).add_(part, alpha=-lr * scale)

    def _direction(self, name: str) -> Tensor:
        """Nesterov momentum of the gradient, whole."""
        gradient = self.parameters[name].grad
        assert gradient is not None, name
        buffer = self.momentum_buffers[name]
        local(buffer).lerp_(local(gradient), 1 - self.momentum)
        direction = local(gradient).lerp(local(buffer), self.momentum)
        return whole(direction, self.parameters[name])
