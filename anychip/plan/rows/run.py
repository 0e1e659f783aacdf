"""A measured run, ready to be predicted, and why another is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from anychip.plan.types import Layout, Workload

Software = Literal["megatron-2021", "megatron", "deepspeed", "fsdp", "mindspeed", "mindformers", "jax"]


@dataclass(frozen=True)
class Run:
    """One measured run, ready to be predicted."""

    id: str
    source: str  # the page or table it was printed in
    publisher: str  # whose measurements they are, over all its pages
    model: str  # what leave-one-model-out leaves out
    software: Software
    chip: str  # as the catalogue names it
    named_chip: bool  # the source names the chip, or its family
    devices: int
    devices_per_node: int | None
    inter_node_gbit_per_s: float | None  # a device
    network: str  # name of the network between nodes, where it is known to behave in its own way
    workload: Workload
    layout: Layout
    seconds: float | None
    memory_bytes: float | None
    memory_kind: Literal["allocated", "used"] = "allocated"  # tensors only, or with context and allocator
    group: str = ""  # runs that differ in their layout only: pair order and regret are taken inside
    facts: tuple[tuple[str, float], ...] = ()  # fields of the site that hold for this run alone
    assumed: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Skipped:
    id: str
    reason: str


class Incomplete(Exception):
    """A row does not say enough; the message says what is missing."""
