"""A third party's backend, whole: a made-up chip that computes with the CPU. docs/en/chips.md explains each part.

Its package declares it so:    [project.entry-points."anychip.chips"]
                               toy = "toy_chip:ToyBackend"
"""

from __future__ import annotations

import re

import torch

from anychip.chips.accelerator import AcceleratorBackend, MemoryStatistics
from anychip.chips.facts import Collectives, DeviceHealth, ErrorMeaning, HealthCommand, Setting, VendorFacts


def parse_toy_smi(text: str) -> list[DeviceHealth]:
    """`toy-smi` prints one line a device: "0 fine 41C"."""
    found = re.findall(r"^(\d+) (\w+) (\d{1,6})C$", text, re.MULTILINE)
    return [
        DeviceHealth(
            device, healthy=state == "fine", problems=() if state == "fine" else (state,), temperature_c=float(t)
        )
        for device, state, t in found
    ]


FACTS = VendorFacts(
    vendor="toy",
    maker="Toy Works",
    device_type="cpu",
    collectives=Collectives("gloo", library="ToyCCL", refused_ops=frozenset({"AVG", "PREMUL_SUM"})),
    visible_devices="TOY_VISIBLE_DEVICES",
    tools=("toy-smi",),
    settings=(
        Setting("TOY_QUEUE", "2", "Two-stage launch."),
        Setting("TOY_DETERMINISTIC", "1", "Reductions add in one order.", "deterministic"),
    ),
    health=HealthCommand(("toy-smi",), parse_toy_smi),
    errors=(ErrorMeaning("TOY_SPRING_BROKEN", "the spring is broken", True, "Wind up another device."),),
)


class ToyBackend(AcceleratorBackend):
    facts = FACTS

    def device_count(self) -> int:
        return 4

    def device(self, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    def multiplies_bf16(self) -> bool:
        return False

    def memory(self) -> MemoryStatistics:
        return MemoryStatistics(None, None, None, 4_321_000_000)

    def synchronize(self) -> None:
        """Nothing is queued."""
