"""Stages of a pipeline. A stage is a Decoder that keeps only its layers, under their names in the whole model; the
first one embeds, the last one ends in the final norm and the head."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from anychip.model.decoder import Decoder
from anychip.parallel.layout import num_stages, stage_layers, stages_of
from anychip.parallel.processes import Processes


def layers_of_stages(processes: Processes, num_hidden_layers: int) -> list[tuple[range, bool, bool]]:
    """Layers, and whether it is the first or the last stage, for each stage of this process."""
    config = processes.config
    ranges, last = stage_layers(config, num_hidden_layers), num_stages(config) - 1
    return [(ranges[i], i == 0, i == last) for i in stages_of(config, processes.place.pipeline)]


def keep_stage(
    model: Decoder, layers: range, *, first: bool, last: bool, device: torch.device, exchange_device: torch.device
) -> None:
    """Drop from a whole decoder everything that is not of this stage; the rest keeps its names.

    The stage computes on `device`; hidden states come from and leave for other stages on `exchange_device`.
    """
    kept = nn.ModuleList()
    for index in layers:
        kept.add_module(str(index), model.layers[index])
    model.layers = kept
    if not first:
        model.embed_tokens = None  # type: ignore[assignment]
    if not last:
        model.norm = model.lm_head = None  # type: ignore[assignment]
    model.forward = partial(_stage_forward, model, device, exchange_device)  # type: ignore[method-assign]


def _stage_forward(
    model: Decoder,
    device: torch.device,
    exchange_device: torch.device,
    x: Tensor,
    documents: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Token ids (first stage) or hidden states -> hidden states; `tables` is set for each step."""
    x = x.to(device)
    if model.embed_tokens is not None:
        x = model.embed(x)
    mask = None if documents is None else model.visible(documents)
    x = model.run_layers(x, model.tables, mask=mask, keys=keys)  # type: ignore[arg-type]
    return x.to(exchange_device) if model.norm is None else model.final(x)
