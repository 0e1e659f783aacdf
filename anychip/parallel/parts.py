"""This process's part of a model: built on the meta device, cut by each dimension in turn, then given memory.

A layout only ever changes which part of which named tensor lies here. `Decoder` knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from anychip import alive
from anychip.chips.operators import Operators, reference
from anychip.model.arithmetic import parameter_shapes
from anychip.model.decoder import Decoder
from anychip.model.init import init_experts, init_tensor
from anychip.model.lora import add_adapters, freeze, init_adapter, is_adapter
from anychip.parallel.context import apply_context_parallel
from anychip.parallel.data import READING_AXES, apply_sharding
from anychip.parallel.expert import apply_expert_parallel
from anychip.parallel.layout import check_layout
from anychip.parallel.processes import Processes
from anychip.parallel.stage import keep_stage, layers_of_stages
from anychip.parallel.tensor import apply_tensor_parallel, box_of, local, part_of
from anychip.parallel.tensor_experts import apply_tensor_parallel_to_experts
from anychip.recipe.schema import LoraConfig, ModelConfig


def allocate(part: Decoder, device: torch.device) -> None:
    """Move a part from the meta device to uninitialised memory."""
    part.to_empty(device=device)


def build_parts(
    config: ModelConfig,
    processes: Processes,
    dtype: torch.dtype,
    operators: Operators = reference,
    prepare: Callable[[Decoder], None] = lambda part: None,
    give_memory: Callable[[Decoder, torch.device], None] = allocate,
    lora: LoraConfig | None = None,
) -> list[Decoder]:
    """The decoders this process holds: one, or one a pipeline stage. Their memory is not filled yet.

    `prepare` is called on each before it is sharded (recomputation and compilation wrap the layers there);
    `give_memory` takes it from the meta device to the process's own. With `lora` only its adapters are learned.
    """
    check_layout(processes.config, processes.layout, config)
    if config.n_routed_experts:
        processes.group(*READING_AXES)  # made by all processes, whether their stage has experts or not
    pipelined = processes.layout.pipeline > 1
    parts = []
    for stage in layers_of_stages(processes, config.num_hidden_layers) if pipelined else [None]:
        with torch.device("meta"):
            part = Decoder(config, dtype, operators)
            if lora is not None:
                add_adapters(part, lora)
        if stage is not None:
            layers, first, last = stage
            keep_stage(
                part,
                layers,
                first=first,
                last=last,
                device=processes.device,
                exchange_device=processes.exchange_device,
            )
        if (context := processes.mesh("context")) is not None:
            apply_context_parallel(part, context, processes.config.context_method, operators)
        if (tensor := processes.mesh("tensor")) is not None:
            apply_tensor_parallel(part, tensor)
            apply_tensor_parallel_to_experts(part, tensor)
        apply_expert_parallel(part, processes)
        if lora is not None:
            freeze(part)
        prepare(part)
        if (sharding := processes.sharding_mesh()) is not None:
            apply_sharding(part, sharding, dtype, pipelined=pipelined, experts=processes.expert_sharding_mesh)
        give_memory(part, processes.device)
        parts.append(part)
    return parts


def named_parameters(parts: list[Decoder]) -> dict[str, nn.Parameter]:
    """Parameters of all parts by their logical names, in the order of the forward pass."""
    return {name: parameter for part in parts for name, parameter in part.named_parameters()}


def initialize_parts(parameters: Mapping[str, Tensor], config: ModelConfig, seed: int) -> None:
    """Fill the parameters held here as a whole model of this seed would have them."""
    for name, shape in parameter_shapes(config):
        if name not in parameters:
            continue
        if len(shape) == 3:
            _initialize_experts(parameters[name], name, config, seed)
        else:
            copy_part(parameters[name], init_tensor(name, shape, config, seed))
        alive.progressed()


def _initialize_experts(parameter: Tensor, name: str, config: ModelConfig, seed: int) -> None:
    """One expert after the other: all of them together may be larger than what a process holds."""
    first, *inside = box_of(parameter)
    target = local(parameter.detach())
    for place, expert in enumerate(range(*first.indices(parameter.shape[0]))):
        whole_expert = init_experts(name, range(expert, expert + 1), tuple(parameter.shape[1:]), config, seed)[0]
        target[place].copy_(whole_expert[tuple(inside)])
        alive.progressed()


def initialize_adapters(parameters: Mapping[str, Tensor], seed: int) -> None:
    """Fill the adapters held here as a whole model of this seed would have them."""
    for name, parameter in parameters.items():
        if is_adapter(name):
            copy_part(parameter, init_adapter(name, tuple(parameter.shape), seed))


def copy_part(parameter: Tensor, whole_tensor: Tensor) -> None:
    """Fill a parameter, or this process's part of it, from the whole tensor (on the CPU)."""
    local(parameter.detach()).copy_(part_of(parameter, whole_tensor))
