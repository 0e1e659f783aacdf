"""A tensor that stayed on the CPU is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device_process import needs_device, on_device
from torch import Tensor, nn

from anychip.chips.emulated.watch import CpuTensorError, cpu_watch


def test_products_on_the_cpu_are_found_and_small_work_is_not() -> None:
    x = torch.ones(3, 3)
    with cpu_watch():
        torch.randn(3, 3).add(1).sum()
        with pytest.raises(CpuTensorError, match="aten::mm runs on the CPU"):
            x @ x
        with pytest.raises(CpuTensorError, match="attention"):
            nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 4)] * 3)
    x @ x


class _ThroughTheCpu(torch.autograd.Function):
    """Forward on the accelerator, backward silently not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = grad_outputs[0].cpu()
        return (grad @ x.cpu().t() + x.cpu().t() @ grad).to(x.device)


def _in_backward() -> None:
    x = torch.ones(3, 3, device="emulated", requires_grad=True)
    with cpu_watch():
        (x @ x).sum().backward()
        hidden = _ThroughTheCpu.apply(x).sum()
        with pytest.raises(CpuTensorError, match="aten::mm runs on the CPU"):
            hidden.backward()
        with pytest.raises(CpuTensorError, match="mixes the CPU with an accelerator"):
            torch.cat([x.detach(), torch.ones(1, 3)])
        assert x.detach().cpu().to("emulated").sum() == 9  # moving is not mixing


@needs_device
def test_backward_is_watched_too(tmp_path: Path) -> None:
    on_device(_in_backward, tmp_path)


def _in_training() -> None:
    from anychip.chips.backend import detect_backend

    detect_backend().prepare_process()
    with pytest.raises(CpuTensorError):
        torch.ones(3, 3) @ torch.ones(3, 3)


@needs_device
def test_the_quirk_watches_a_whole_run(tmp_path: Path) -> None:
    on_device(_in_training, tmp_path, quirks="cpu_watch")


def _sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("emulated", (2,))
    with cpu_watch():
        x = distribute_tensor(torch.ones(4, 4, device="emulated"), mesh, [Shard(0)])
        assert (x @ x.t()).full_tensor().sum() == 64


@needs_device
def test_sharded_tensors_are_watched_by_their_parts(tmp_path: Path) -> None:
    on_device(_sharded, tmp_path, world_size=2)
