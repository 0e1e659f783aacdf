"""The parts of Kubernetes objects that we write, as a schema that refuses everything else.

Names and types are those of the Kubernetes API (core/v1) and of the job operators' resource definitions: PyTorchJob
(kubeflow.org/v1), Job (batch.volcano.sh/v1alpha1), AscendJob (mindxdl.gitee.com/v1).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.alias_generators import to_camel

Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]  # RFC 1123
Key = Annotated[
    str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$")
]
Value = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$")]
Path = Annotated[str, Field(pattern=r"^/")]
Count = Annotated[int, Field(gt=0)]


class Part(BaseModel):
    """Fields have Kubernetes' names in the file; an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel)


class Metadata(Part):
    name: Label | None = None
    namespace: Label | None = None
    labels: dict[Key, Value] | None = None
    annotations: dict[Key, str] | None = None


class FieldReference(Part):
    field_path: str


class ValueSource(Part):
    field_ref: FieldReference


class Variable(Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    value_from: ValueSource | None = None

    @model_validator(mode="after")
    def _has_one_value(self) -> Variable:
        if (self.value is None) == (self.value_from is None):
            raise ValueError(f"variable {self.name} needs a value or a source, not both")
        return self


class Resources(Part):
    limits: dict[Key, Count]
    requests: dict[Key, Count]


class Mount(Part):
    name: Label
    mount_path: Path
    read_only: bool | None = None


class Port(Part):
    name: Annotated[str, Field(max_length=15)]
    container_port: Annotated[int, Field(gt=0, lt=65536)]


class Container(Part):
    name: Label
    image: Annotated[str, Field(min_length=1)]
    working_dir: Path
    command: list[str]
    env: list[Variable]
    ports: list[Port]
    resources: Resources | None = None
    volume_mounts: list[Mount]


class ConfigMapVolume(Part):
    name: Label


class Memory(Part):
    medium: Literal["Memory"] = "Memory"


class Claim(Part):
    claim_name: Label


class HostPath(Part):
    path: Path


class Volume(Part):
    name: Label
    config_map: ConfigMapVolume | None = None
    empty_dir: Memory | None = None
    persistent_volume_claim: Claim | None = None
    host_path: HostPath | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Volume:
        sources = [self.config_map, self.empty_dir, self.persistent_volume_claim, self.host_path]
        if sum(source is not None for source in sources) != 1:
            raise ValueError(f"volume {self.name} needs one source")
        return self


class PodSpec(Part):
    restart_policy: Literal["Never", "OnFailure"] | None = None
    node_selector: dict[Key, Value] | None = None
    containers: Annotated[list[Container], Field(min_length=1, max_length=1)]
    volumes: list[Volume]

    @model_validator(mode="after")
    def _mounts_exist(self) -> PodSpec:
        volumes = {volume.name for volume in self.volumes}
        for mount in self.containers[0].volume_mounts:
            if mount.name not in volumes:
                raise ValueError(f"volume {mount.name} is mounted and not there")
        return self


class PodTemplate(Part):
    metadata: Metadata | None = None
    spec: PodSpec


class ConfigMap(Part):
    api_version: Literal["v1"] = "v1"
    kind: Literal["ConfigMap"] = "ConfigMap"
    metadata: Metadata
    data: dict[Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")], str]


class Replica(Part):
    """Pods of one role, in PyTorchJob and AscendJob alike."""

    replicas: Count
    restart_policy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: PodTemplate


class SchedulingPolicy(Part):
    min_available: Count
    queue: str | None = None


class RunPolicy(Part):
    backoff_limit: Count
    clean_pod_policy: Literal["All", "Running", "None"] | None = None
    scheduling_policy: SchedulingPolicy | None = None


class Replicas(BaseModel):
    """Roles are written with a capital."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    Master: Replica
    Worker: Replica | None = None

    @model_validator(mode="after")
    def _one_master(self) -> Replicas:
        if self.Master.replicas != 1:
            raise ValueError("there is one Master")
        return self


class PyTorchJobSpec(Part):
    nproc_per_node: str
    run_policy: RunPolicy
    pytorch_replica_specs: Replicas


class PyTorchJob(Part):
    api_version: Literal["kubeflow.org/v1"] = "kubeflow.org/v1"
    kind: Literal["PyTorchJob"] = "PyTorchJob"
    metadata: Metadata
    spec: PyTorchJobSpec


class VolcanoPolicy(Part):
    event: Literal["PodFailed", "PodEvicted", "TaskCompleted"]
    action: Literal["RestartJob", "AbortJob", "CompleteJob"]


class VolcanoTask(Part):
    name: Label
    replicas: Count
    template: PodTemplate


class VolcanoSpec(Part):
    scheduler_name: Literal["volcano"] = "volcano"
    min_available: Count
    queue: str | None = None
    max_retry: Count
    plugins: dict[Literal["svc", "env"], list[str]]
    policies: list[VolcanoPolicy]
    tasks: Annotated[list[VolcanoTask], Field(min_length=1)]


class VolcanoJob(Part):
    api_version: Literal["batch.volcano.sh/v1alpha1"] = "batch.volcano.sh/v1alpha1"
    kind: Literal["Job"] = "Job"
    metadata: Metadata
    spec: VolcanoSpec


class AscendJobSpec(Part):
    scheduler_name: Literal["volcano"] = "volcano"
    run_policy: RunPolicy
    success_policy: Literal["AllWorkers"] = "AllWorkers"
    replica_specs: Replicas


class AscendJob(Part):
    api_version: Literal["mindxdl.gitee.com/v1"] = "mindxdl.gitee.com/v1"
    kind: Literal["AscendJob"] = "AscendJob"
    metadata: Metadata
    spec: AscendJobSpec


Manifest = Annotated[ConfigMap | PyTorchJob | VolcanoJob | AscendJob, Field(discriminator="kind")]
_ANY: TypeAdapter[ConfigMap | PyTorchJob | VolcanoJob | AscendJob] = TypeAdapter(Manifest)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block; a part that stands in two places twice, for few readers expect anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def manifest_text(documents: list[dict[str, Any]]) -> str:
    """The text of a manifest file, checked as it will be read. Raises pydantic's ValidationError."""
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    check(text)
    return text


def check(text: str) -> None:
    """Hold every document of a manifest file to the schema. Raises pydantic's ValidationError."""
    for document in yaml.safe_load_all(text):
        _ANY.validate_python(document)
