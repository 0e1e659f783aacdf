"""What all Kubernetes jobs share: the Pod of one node, and the recipe as a ConfigMap."""

from __future__ import annotations

from typing import Any

from anychip.launch.command import torchrun_line
from anychip.launch.environment import variables
from anychip.launch.job import Job, Nodes
from anychip.recipe import dump_recipe

RECIPE_FOLDER = "/etc/anychip"
POD_ADDRESS = {"ANYCHIP_POD_IP": "status.podIP"}


def recipe_map(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-recipe", "namespace": job.launch.namespace},
        "data": {"recipe.yaml": dump_recipe(job.recipe)},
    }


def metadata(job: Job, labels: dict[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": job.name, "namespace": job.launch.namespace}
    if labels:
        found["labels"] = labels
    if job.launch.annotations:
        found["annotations"] = dict(job.launch.annotations)
    return found


def pod_spec(
    job: Job,
    group: Nodes,
    *,
    container: str,
    port_name: str,
    node: str,
    endpoint: str,
    generation: str,
    fields: dict[str, str],
) -> dict[str, Any]:
    """One node's Pod. `node`, `endpoint` and `generation` are shell words that the Pod's shell expands; `fields` are
    variables that take the value of a field of the Pod."""
    launch = job.launch
    line = torchrun_line(
        job, node=node, processes=str(group.processes), endpoint=endpoint, generation=generation,
        recipe=f"{RECIPE_FOLDER}/recipe.yaml", bind='"$ANYCHIP_POD_IP"',
    )  # fmt: skip
    sources: dict[str, dict[str, Any]] = {
        "recipe": {"configMap": {"name": f"{job.name}-recipe"}},
        "shared-memory": {"emptyDir": {"medium": "Memory"}},
        "data": {"persistentVolumeClaim": {"claimName": launch.volume_claim}},
    }
    mounts = {"recipe": RECIPE_FOLDER, "shared-memory": "/dev/shm", "data": launch.mount_path}
    for number, path in enumerate(job.facts.scheduling.host_paths):
        sources[f"host-{number}"], mounts[f"host-{number}"] = {"hostPath": {"path": path}}, path
    found: dict[str, Any] = {
        "containers": [
            {
                "name": container,
                "image": launch.image,
                "workingDir": launch.working_directory or launch.mount_path,
                "command": ["bash", "-c", f"exec {line}"],
                "env": _environment(job, fields),
                "ports": [{"name": port_name, "containerPort": launch.port}],
                **_resources(job, group),
                "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
            }
        ],
        "volumes": [{"name": name, **source} for name, source in sources.items()],
    }
    if launch.node_selector:
        found["nodeSelector"] = dict(launch.node_selector)
    return found


def explained(job: Job, text: str) -> str:
    """The manifest with the reason behind each variable's name."""
    reasons = {setting.name: setting.why for setting in variables(job)}
    lines = []
    for line in text.splitlines():
        why = reasons.get(line.partition("- name: ")[2])
        lines.append(f"{line}  # {why}" if why else line)
    return "\n".join(lines) + "\n"


def _environment(job: Job, fields: dict[str, str]) -> list[dict[str, Any]]:
    named = {**POD_ADDRESS, **fields}
    return [
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in named.items()),
        *({"name": setting.name, "value": setting.value} for setting in variables(job) if setting.name not in named),
    ]


def _resources(job: Job, group: Nodes) -> dict[str, Any]:
    """All devices of a node, so that each Pod has a node of its own. A CPU is not asked for."""
    device = job.facts.scheduling.device(group.chip.id)
    if device is None:
        return {}
    wanted = {device.resource: group.processes}
    return {"resources": {"limits": wanted, "requests": dict(wanted)}}
