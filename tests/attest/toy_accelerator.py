"""A chip of a make that nobody knows: it computes with the CPU."""

from __future__ import annotations

from dataclasses import replace

from anychip.chips.cpu import FACTS, CpuBackend


class ToyBackend(CpuBackend):
    facts = replace(FACTS, vendor="toy", maker="Toy Works")
