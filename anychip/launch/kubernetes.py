"""The manifests of three job operators: Kubeflow's PyTorchJob, Volcano's Job, MindCluster's AscendJob.

All start one Pod a node, which runs torchrun; none restarts a process inside a Pod. Where a Pod fails, the operator
starts Pods again and training continues from the newest checkpoint.
"""

from __future__ import annotations

from itertools import accumulate
from secrets import token_hex
from typing import Any

from anychip.launch.job import Job
from anychip.launch.manifest import manifest_text
from anychip.launch.pods import explained, metadata, pod_spec, recipe_map

RETRIES = 10  # starts of the whole job; a fault that comes back each time is not the hardware's
_OPERATOR_ENDPOINT = '"$MASTER_ADDR:$MASTER_PORT"'  # both operators set these, and RANK to the Pod's number


def pytorchjob(job: Job) -> str:
    """The training operator fixes the names of container and port. Pods are restarted in place, and it counts the
    restarts of all of them together."""
    return _text(
        job,
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": metadata(job),
            "spec": {
                "nprocPerNode": str(job.groups[0].processes),
                "runPolicy": {"backoffLimit": RETRIES * job.nodes, "cleanPodPolicy": "Running", **_gang(job)},
                "pytorchReplicaSpecs": _replicas(job, "pytorch", "pytorchjob-port", "OnFailure", {}, {}),
            },
        },
    )


def ascendjob(job: Job) -> str:
    """MindCluster's operator fixes the names of container and port, and knows the chip by a label. Its scheduler
    starts all Pods again when one fails."""
    device = job.facts.scheduling.device(job.groups[0].chip.id)
    assert device is not None
    chip = {"ring-controller.atlas": device.operator_label}
    labels = {"framework": "pytorch", **chip, "fault-scheduling": "force", "fault-retry-times": str(RETRIES)}
    fields = dict(job.facts.scheduling.pod_fields)
    return _text(
        job,
        {
            "apiVersion": "mindxdl.gitee.com/v1",
            "kind": "AscendJob",
            "metadata": metadata(job, labels),
            "spec": {
                "schedulerName": "volcano",
                "runPolicy": {"backoffLimit": RETRIES, **_gang(job, "default")},
                "successPolicy": "AllWorkers",
                "replicaSpecs": _replicas(job, "ascend", "ascendjob-port", "Never", chip, fields),
            },
        },
    )


def volcanojob(job: Job) -> str:
    """One task a group of nodes. Volcano starts all Pods together, and all of them again when one fails."""
    starts = [0, *accumulate(group.count for group in job.groups)]
    return _text(
        job,
        {
            "apiVersion": "batch.volcano.sh/v1alpha1",
            "kind": "Job",
            "metadata": metadata(job),
            "spec": {
                "schedulerName": "volcano",
                "minAvailable": job.nodes,
                **({"queue": job.launch.queue} if job.launch.queue else {}),
                "maxRetry": RETRIES,
                "plugins": {"svc": ["--publish-not-ready-addresses=true"], "env": []},
                "policies": [{"event": event, "action": "RestartJob"} for event in ("PodFailed", "PodEvicted")],
                "tasks": [_task(job, number, start) for number, start in enumerate(starts[:-1])],
            },
        },
    )


def _task(job: Job, number: int, first_node: int) -> dict[str, Any]:
    """The plug-ins give each Pod its index in the task, and a name by which the others find it. The operator counts
    the starts of a job in an annotation."""
    group = job.groups[number]
    fields = {
        "ANYCHIP_JOB_VERSION": "metadata.annotations['volcano.sh/job-version']",
        **job.facts.scheduling.pod_fields,
    }
    pod = pod_spec(
        job, group, container="anychip", port_name="rendezvous", node=f'"$(({first_node} + VC_TASK_INDEX))"',
        endpoint=f"{job.name}-{_task_name(0)}-0.{job.name}:{job.launch.port}", generation='"$ANYCHIP_JOB_VERSION"',
        fields=fields,
    )  # fmt: skip
    spec = {"restartPolicy": "Never", **pod}
    return {"name": _task_name(number), "replicas": group.count, "template": {"spec": spec}}


def _task_name(number: int) -> str:
    return f"nodes{number}"


def _replicas(
    job: Job, container: str, port: str, restart: str, labels: dict[str, str], fields: dict[str, str]
) -> dict[str, Any]:
    """Node 0 is the Master, the others are Workers. The operators count starts nowhere that a Pod can see, so the
    rendezvous id is new each time that the manifest is written; a new Master brings a new, empty store."""
    (group,) = job.groups
    pod = pod_spec(
        job, group, container=container, port_name=port, node='"$RANK"', endpoint=_OPERATOR_ENDPOINT,
        generation=token_hex(4), fields=fields,
    )  # fmt: skip
    template = {**({"metadata": {"labels": labels}} if labels else {}), "spec": pod}
    counts = {"Master": 1, "Worker": group.count - 1}
    return {
        role: {"replicas": count, "restartPolicy": restart, "template": template}
        for role, count in counts.items()
        if count
    }


def _gang(job: Job, default_queue: str | None = None) -> dict[str, Any]:
    """All Pods or none: half a job would hold its nodes and wait. MindCluster's operator wants a queue."""
    queue = job.launch.queue or default_queue
    return {"schedulingPolicy": {"minAvailable": job.nodes, **({"queue": queue} if queue else {})}}


def _text(job: Job, manifest: dict[str, Any]) -> str:
    return explained(job, manifest_text([recipe_map(job), manifest]))
