"""What the catalogue says of a chip. What nobody has published stays None: unknown is unknown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Confidence = Literal["official", "press", "measured", "derived"]
Dtype = Literal["bf16", "fp16", "fp32", "tf32", "fp8", "int8"]
Count = Annotated[int, Field(gt=0)]
FROM_MEMORY = "from memory"


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Entry):
    """A number, who says so, and how far that can be trusted.

    official: the vendor published it; press: it was reported; measured: somebody ran a benchmark; derived: follows
    from another figure. A source that says "from memory" was not read again when the catalogue was written.
    """

    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    source: Annotated[str, Field(min_length=1)]
    confidence: Confidence

    @property
    def from_memory(self) -> bool:
        return FROM_MEMORY in self.source

    @property
    def standing(self) -> str:
        """How to present the figure: never as plainly official when nobody read the vendor's page again."""
        return f"{self.confidence}, {FROM_MEMORY}" if self.from_memory else self.confidence


class Chip(Entry):
    """One accelerator as PyTorch sees it, or a package of several (`dies`). Peaks are dense, without sparsity."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    vendor: Annotated[str, Field(description="name of its backend, such as ascend")]
    maker: str
    name: str
    year: Annotated[int, Field(ge=2015, le=2100)] | None = None
    torch_device_type: str
    torch_name: str | None = Field(None, description="regular expression for the name that torch gives it, from memory")
    peak_tflops: dict[Dtype, Figure] = Field({}, description="10^12 operations a second, dense")
    measured_tflops: dict[Dtype, Figure] = Field({}, description="what a benchmark reached; not a peak")
    memory_gb: Figure | None = Field(None, description="10^9 bytes, as printed by the vendor")
    memory_gb_per_s: Figure | None = None
    devices_per_node: Count | None = Field(None, description="in the usual server")
    intra_node_link: str | None = None
    intra_node_gb_per_s: Figure | None = Field(None, description="a device, one direction, all links together")
    intra_node_mesh: bool = Field(False, description="each pair of a node's devices has a link of its own, no switch")
    inter_node_gbit_per_s: Figure | None = Field(None, description="a device, one direction")
    supernode_devices: Count | None = Field(None, description="devices that share the fast link beyond one node")
    tdp_watts: Figure | None = None
    dies: Count | None = Field(None, description="a package: so many devices, as PyTorch counts, are in it")
    package: str | None = Field(None, description="a die: id of the package it belongs to")
    notes: str = ""

    @property
    def figures(self) -> dict[str, Figure]:
        """Every known figure by its field's name, peaks as `peak_tflops.bf16`."""
        found = {f"peak_tflops.{dtype}": figure for dtype, figure in self.peak_tflops.items()}
        found |= {f"measured_tflops.{dtype}": figure for dtype, figure in self.measured_tflops.items()}
        return found | {name: value for name, value in self if isinstance(value, Figure)}

    @model_validator(mode="after")
    def _is_die_or_package(self) -> Chip:
        if self.dies is not None and self.package is not None:
            raise ValueError(f"{self.id} cannot be both a package (dies) and a die (package)")
        return self
