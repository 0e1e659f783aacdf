"""A cluster file: which chips, how many, how they are joined, how often they fail, how jobs are started on them.

`plan` and `launch` read it. Bandwidths are per device and direction; what is left out comes from the chip catalogue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from anychip.errors import InputError
from anychip.recipe.load import FileKind, explain, read_yaml
from anychip.recipe.schema import Fraction, Positive, Section

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\[][A-Za-z0-9_.:/@%+=,\[\]-]*$")]  # safe in a line of a script
CLUSTER_FILE = FileKind("cluster file", "clusters/ascend-910b-8192.yaml", "name and groups")
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f]*$")]


class NodeGroup(Section):
    """Nodes of one kind."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    chip: str = Field(description="a chip of the catalogue, such as ascend-910b3 (`anychip chips` lists them)")
    nodes: Positive
    devices_per_node: Positive | None = Field(None, description="default: the catalogue's")
    intra_node_gb_per_s: PositiveFloat | None = Field(None, description="GB/s a device and direction inside a node")
    inter_node_gbit_per_s: PositiveFloat | None = Field(None, description="Gbit/s a device between nodes")
    supernode_nodes: Positive | None = Field(None, description="nodes that share the fast link, if more than one")
    watts_per_node: PositiveFloat | None = Field(None, description="power of a whole node under load")


class FailureConfig(Section):
    """How often nodes fail and what a failure costs. Everything is off by default."""

    per_1000_node_days: NotNegative = Field(0.0, description="failures that stop the job")
    detect_seconds: NotNegative = 0.0
    restart_seconds: NotNegative = Field(0.0, description="rescheduling, process start, groups, warm-up")
    load_seconds: NotNegative | None = Field(None, description="reading a checkpoint; default: from its size")
    storage_gb_per_s: PositiveFloat | None = Field(None, description="what the whole cluster reads or writes together")
    checkpoint_stall_seconds: NotNegative = Field(0.0, description="training stands still at each save to storage")
    memory_copy_seconds: NotNegative | None = Field(
        None, description="training stands still at each copy to another node's memory; default: no such copies"
    )
    memory_copy_survives: Fraction = Field(0.9, description="share of failures after which such a copy is still there")
    memory_load_seconds: NotNegative = Field(0.0, description="coming back from such a copy")
    repair_hours: NotNegative = 0.0
    spare_nodes: Annotated[int, Field(ge=0, description="nodes that wait for others to fail, beside `nodes`")] = 0
    straggler_sigma: NotNegative = Field(0.0, description="relative noise of one device's step time")
    slow_node_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    slow_node_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0


class LaunchConfig(Section):
    """What a scheduler must be told."""

    kind: Literal["torchrun", "slurm", "kubernetes", "volcano", "ascendjob"] = "torchrun"
    hosts: list[Word] = Field(default_factory=list, description="torchrun: one address a node, the first one leads")
    port: Annotated[int, Field(gt=1023, lt=65536)] = 29500
    network_interface: Word | None = Field(
        None, description="interface that the processes find each other on, such as eth0; the same on every node"
    )
    working_directory: Line | None = Field(
        None,
        description="where relative paths of the recipe and `runs` are; default: the present folder, or mount_path",
    )
    python: Line | None = Field(
        None, description="interpreter that has anychip; default: the one that runs launch, in an image `python`"
    )
    image: Word | None = None
    namespace: Word = "default"
    partition: Word | None = None
    account: Word | None = None
    time_limit: Word | None = None
    gres: Word | None = Field(None, description="Slurm: devices of a node, such as gpu:8; default: --exclusive alone")
    queue: Word | None = None
    node_selector: dict[str, str] = Field(default_factory=dict, description="Kubernetes: labels that nodes must carry")
    annotations: dict[str, str] = Field(default_factory=dict, description="Kubernetes: annotations of the job")
    volume_claim: Word | None = Field(None, description="Kubernetes: claim that holds recipes and runs")
    mount_path: Line = "/data"
    environment: dict[VariableName, Line] = Field(default_factory=dict)


class Cluster(Section):
    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    groups: Annotated[list[NodeGroup], Field(min_length=1)]
    between_groups_gbit_per_s: PositiveFloat | None = Field(None, description="Gbit/s a device between node groups")
    failures: FailureConfig = FailureConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> Cluster:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError(f"group names must differ, found {names}")
        return self

    @model_validator(mode="after")
    def _spares_are_few(self) -> Cluster:
        nodes, spares = sum(group.nodes for group in self.groups), self.failures.spare_nodes
        if spares > nodes:
            raise ValueError(f"failures.spare_nodes is {spares}, more than the {nodes} nodes that they stand in for")
        return self


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file. Raises InputError naming the field and what it may be."""
    try:
        return Cluster.model_validate(read_yaml(path, CLUSTER_FILE))
    except ValidationError as error:
        raise InputError(" ".join(explain(error, Cluster)), where=path) from None
