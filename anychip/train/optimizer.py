"""The optimizer: fused AdamW for everything, or Muon for the layers' matrices and AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anychip.recipe.schema import OptimizerConfig
from anychip.train.muon import Muon


class Optimizer:
    """Owns the optimizer's state under the parameters' logical names.

    State (all fp32): `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME` of AdamW, `momentum.NAME` of Muon.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, product_dtype: torch.dtype) -> None:
        self.config = config
        parameters = dict(model.named_parameters())
        matrices = {name: p for name, p in parameters.items() if name.startswith("layers.") and p.ndim == 2}
        muon = matrices if config.name == "muon" else {}
        self._adamw_parameters = {name: p for name, p in parameters.items() if name not in muon}
        self.muon = Muon(muon, config.muon_momentum, config.weight_decay, product_dtype) if muon else None
        self.adamw = self._build_adamw(config)

    def _build_adamw(self, config: OptimizerConfig) -> torch.optim.AdamW:
        """Norms and biases are not decayed. State exists from the start, so that a checkpoint can be read into it."""
        decayed = [p for p in self._adamw_parameters.values() if p.ndim >= 2]
        plain = [p for p in self._adamw_parameters.values() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for parameter in self._adamw_parameters.values():
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def step(self, lr: float) -> None:
        """Apply the gradients with this learning rate."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        if self.muon is not None:
            self.muon.step(lr)

    def state(self) -> dict[str, Tensor]:
        """The live state tensors (not copies) by name."""
        named = {}
        for name, parameter in self._adamw_parameters.items():
            for key, value in self.adamw.state[parameter].items():
                named[f"{key}.{name}"] = value
        if self.muon is not None:
            named.update({f"momentum.{name}": buffer for name, buffer in self.muon.momentum_buffers.items()})
        return named
