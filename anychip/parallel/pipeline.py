"""Pipeline parallelism: micro-batches passed from stage to stage (`stage.py`), on PyTorch's schedules. Importing those
takes a second, so only what builds a pipeline imports this file.

Schedules: gpipe (arXiv 1811.06965), 1f1b (2006.09503), interleaved (2104.04473), zero_bubble as a V (2401.10241,
2405.15362) and dualpipe_v (2412.19437).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from anychip.model.decoder import Decoder
from anychip.model.rope import Rotary
from anychip.parallel.layout import num_stages, stages_of
from anychip.parallel.processes import Processes

_ONE_STAGE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MANY_STAGES = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleZBVZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}


class Pipeline:
    """This process's stages and the schedule that drives them.

    `stages` are its Decoders in the order data passes them; `loss` maps the last stage's output and labels
    [b, s] to a scalar. Micro-batches have `shape_in` [b, s] ids and pass hidden states of `shape_between`.
    """

    def __init__(
        self,
        processes: Processes,
        stages: Sequence[Decoder],
        num_micro_batches: int,
        shape_in: tuple[int, ...],
        shape_between: tuple[int, ...],
        dtype: torch.dtype,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        config, device = processes.config, processes.exchange_device
        group = processes.group("pipeline")
        assert group is not None
        self._processes, self._stages, self._loss = processes, list(stages), loss
        self._indices = stages_of(config, processes.place.pipeline)
        self._total, self._dtype, self._shape_between = num_stages(config), dtype, shape_between
        ids = torch.empty(shape_in, dtype=torch.int64, device="meta")
        between = torch.empty(shape_between, dtype=dtype, device="meta", requires_grad=True)
        wrapped = [
            PipelineStage(
                stage,
                index,
                self._total,
                device,
                input_args=(ids if index == 0 else between,),
                output_args=(between,),
                group=group,
            )
            for stage, index in zip(stages, self._indices, strict=True)
        ]
        kind = config.pipeline_schedule
        many = len(wrapped) > 1
        schedule: Any = _MANY_STAGES[kind] if many else _ONE_STAGE[kind]
        self._schedule = schedule(wrapped if many else wrapped[0], num_micro_batches, loss_fn=loss, scale_grads=False)

    @property
    def holds_first(self) -> bool:
        return self._indices[0] == 0

    @property
    def holds_last(self) -> bool:
        return self._total - 1 in self._indices

    def forward_backward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        rotary: Rotary,
        documents: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """One step over all micro-batches; gradients are left in the parameters. Returns the loss where it is known,
        zero elsewhere. `keys` are of the tokens whose hidden states lie here."""
        self._set_rotary(rotary)
        losses: list[Tensor] = []
        inputs = (input_ids,) if self.holds_first else ()
        target = labels if self.holds_last else None
        named = _given(documents=documents, keys=keys)
        self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False, **named)
        total = torch.zeros((), device=self._processes.device)
        return total + torch.stack([loss.detach() for loss in losses]).sum() if losses else total

    @torch.no_grad()
    def score(self, input_ids: Tensor, labels: Tensor, rotary: Rotary, documents: Tensor | None = None) -> Tensor:
        """Loss of one micro-batch of any number of rows, without gradients; zero where the last stage is elsewhere."""
        self._set_rotary(rotary)
        group = self._processes.group("pipeline")
        x: Tensor | None = input_ids
        for index in range(self._total):
            owner = self._owner(index)
            if owner == self._processes.place.pipeline:
                if x is None:
                    x = torch.empty(
                        (len(input_ids), *self._shape_between[1:]),
                        dtype=self._dtype,
                        device=self._processes.exchange_device,
                    )
                    dist.recv(x, group=group, group_src=self._owner(index - 1))
                x = self._stages[self._indices.index(index)](x, **_given(documents=documents))
                following = self._owner(index + 1) if index + 1 < self._total else owner
                if following != owner:
                    dist.send(x.contiguous(), group=group, group_dst=following)
                    x = None
            elif index == 0:
                x = None
        if not self.holds_last:
            return torch.zeros((), device=self._processes.device)
        assert x is not None
        return self._loss(x, labels)

    def _owner(self, index: int) -> int:
        places = range(self._processes.layout.pipeline)
        return next(place for place in places if index in stages_of(self._processes.config, place))

    def _set_rotary(self, rotary: Rotary) -> None:
        for stage in self._stages:
            stage.tables = rotary  # type: ignore[assignment]


def _given(**inputs: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if value is not None}
