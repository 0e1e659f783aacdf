"""The optimizer: fused AdamW for everything, or Muon for the layers' matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from anychip.chips.operators import Operators, reference
from anychip.model.arithmetic import is_routing_bias
from anychip.parallel.tensor import local
from anychip.recipe.schema import OptimizerConfig
from anychip.train.muon import Muon


def takes_muon(name: str) -> bool:
    """Whether the optimizer `muon` gives this parameter to Muon, and not to AdamW: matrices of the layers, an expert's
    too."""
    module, _, kind = name.rpartition(".")
    return name.startswith(("layers.", "mtp.")) and kind == "weight" and "proj" in module.rpartition(".")[2]


class Optimizer:
    """Owns the optimizer's state under the parameters' logical names, laid out as the parameters are. `lr_scale` are
    factors of AdamW's rate by name, where they are not 1; weight decay keeps its rate.

    State (all fp32): `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME` of AdamW, `momentum.NAME` of Muon. It exists
    from the start, so that a checkpoint can be read into it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        product_dtype: torch.dtype,
        operators: Operators = reference,
        lr_scale: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.config, self._operators, self.lr_scale = config, operators, lr_scale
        self._routing = {name: p for name, p in parameters.items() if is_routing_bias(name)}
        parameters = {name: p for name, p in parameters.items() if name not in self._routing}
        by_muon = {name: p for name, p in parameters.items() if takes_muon(name)} if config.name == "muon" else {}
        self.muon = Muon(by_muon, config.muon_momentum, config.weight_decay, product_dtype) if by_muon else None
        self._parameters = {name: p for name, p in parameters.items() if name not in by_muon}
        self._exp_avg = {name: torch.zeros_like(p.detach()) for name, p in self._parameters.items()}
        self._exp_avg_sq = {name: torch.zeros_like(p.detach()) for name, p in self._parameters.items()}
        self._step = {
            name: torch.zeros((), dtype=torch.float32, device=p.device) for name, p in self._parameters.items()
        }

    def step(self, lr: float) -> None:
        """Apply the gradients with this learning rate. Norms and biases are not decayed."""
        decayed = [name for name, p in self._parameters.items() if p.ndim >= 2 and not name.endswith("bias")]
        self._adamw(decayed, lr, self.config.weight_decay)
        self._adamw([name for name in self._parameters if name not in set(decayed)], lr, 0.0)
        if self.muon is not None:
            self.muon.step(lr)
        self._balance()

    @torch.no_grad()
    def _balance(self) -> None:
        """What a router's bias has as a gradient is the experts' load: up where it is below the mean, down above (arXiv
        2408.15664, algorithm 1)."""
        for parameter in self._routing.values():
            if parameter.grad is not None:
                load = local(parameter.grad)
                local(parameter.detach()).add_((load.mean() - load).sign(), alpha=self.config.router_bias_update_rate)

    def _adamw(self, names: Iterable[str], lr: float, weight_decay: float) -> None:
        """AdamW is elementwise: each process updates its own part of every tensor."""
        by_scale: dict[float, list[str]] = {}
        for name in names:
            if self._parameters[name].grad is not None:
                by_scale.setdefault(self.lr_scale.get(name, 1.0), []).append(name)
        for scale, alike in by_scale.items():
            self._operators.adamw(
                [local(self._parameters[name].detach()) for name in alike],
                [local(self._gradient(name)) for name in alike],
                [local(self._exp_avg[name]) for name in alike],
                [local(self._exp_avg_sq[name]) for name in alike],
                [self._step[name] for name in alike],
                lr=lr * scale,
                betas=self.config.betas,
                eps=self.config.eps,
                weight_decay=weight_decay / scale,
            )

    def _gradient(self, name: str) -> Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None, name
        return gradient

    def reset(self) -> None:
        """As it was before the first step."""
        for value in self.state().values():
            local(value).zero_()

    def state(self) -> dict[str, Tensor]:
        """The live state tensors (not copies) by name."""
        kept = {"step": self._step, "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        named = {f"{key}.{name}": value for key, by_name in kept.items() for name, value in by_name.items()}
        if self.muon is not None:
            named.update({f"momentum.{name}": buffer for name, buffer in self.muon.momentum_buffers.items()})
        return named
