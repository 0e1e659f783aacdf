"""Small workloads and machines that the planner's tests share."""

from __future__ import annotations

from dataclasses import replace

from anychip.plan.machine import machine_of_chip
from anychip.plan.types import Experts, Layout, Machine, Site, Workload

SITE = Site(name="test", relative_sigma=0.1)
DENSE = Workload("dense", 32, 4096, 11008, 32, 8, 128, 32_000, 4096, 256)
TELECHAT_115B = Workload("telechat2-115b", 96, 8192, 40_960, 64, 8, 128, 131_072, 8192, 1024, biases="telechat2")
EXPERTS = replace(DENSE, name="experts", experts=Experts(16, 2, 2816, shared_ffn=2816, dense_layers=1))
LAYOUT = Layout(dp=4, tp=4, pp=4, micro_batch=1)


def machine(devices: int = 64, chip: str = "ascend-910b3") -> Machine:
    return machine_of_chip(chip, devices)
