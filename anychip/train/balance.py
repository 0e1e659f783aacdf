"""How evenly a step used its experts, and how much each sequence counts in the losses that keep it so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from anychip.model.decoder import Decoder
from anychip.model.experts import Router
from anychip.parallel.processes import Processes
from anychip.recipe.schema import ModelConfig


class Balance:
    """The routers of this process's parts of a model."""

    def __init__(self, parts: Sequence[Decoder], config: ModelConfig, processes: Processes) -> None:
        self._config, self._processes = config, processes
        self.routers: dict[int, Router] = {}  # by the number of the layer, further tokens' behind the last
        for part in parts:
            for name, module in part.named_modules():
                if isinstance(module, Router):
                    kind, number = name.split(".")[:2]
                    self.routers[int(number) + (config.num_hidden_layers if kind == "mtp" else 0)] = module

    def begin_step(self, sequences: int) -> None:
        """Of a global batch: each process adds up its own sequences' router losses, or its part of each."""
        layout = self._processes.layout
        for router in self.routers.values():
            router.loss_scale = 1.0 / (sequences * layout.context)
            router.load = None

    def measure(self) -> Mapping[str, float]:
        """Of the last step, over all processes, which call it together: the busiest expert's load over the mean, in the
        worst layer and on average over layers, and the share of experts that got no token. Empty without experts."""
        if not self._config.n_routed_experts:
            return {}
        layers = self._config.num_hidden_layers + self._config.num_nextn_predict_layers
        loads = torch.zeros(layers, self._config.n_routed_experts, dtype=torch.float32)
        for number, router in self.routers.items():
            if router.load is not None:
                loads[number] = router.load.float().cpu()
        loads = self._processes.sum(loads.to(self._processes.device)).cpu()
        loads = loads[loads.sum(1) > 0]
        if not len(loads):
            return {}
        busiest = loads.amax(1) / loads.mean(1)
        return {
            "expert_load_max": float(busiest.max()),
            "expert_load_max_mean": float(busiest.mean()),
            "experts_idle": float((loads == 0).float().mean()),
        }
