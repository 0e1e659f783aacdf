"""Manifests: the fields that operators fix, a schema that refuses the rest, Pods as the API server would see them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import CONTAINER, LARGE, SPLIT, documents, job, large_recipe
from pydantic import ValidationError

from anychip.errors import InputError
from anychip.launch import kubernetes
from anychip.launch.job import Job, job_of
from anychip.launch.manifest import check, manifest_text
from anychip.launch.write import MANIFESTS, write
from anychip.recipe import parse_recipe
from anychip.recipe.cluster import Cluster
from anychip.train.fence import GENERATION_VARIABLE, LEASE_VARIABLE

KINDS = sorted(MANIFESTS)


def manifest(kind: str, **shape: Any) -> dict[str, Any]:
    """The job's document, without the recipe's."""
    return documents(MANIFESTS[kind](job(kind, **shape)))[1]


def templates(kind: str, document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"]
    roles = spec["tasks"] if kind == "volcano" else (spec.get("pytorchReplicaSpecs") or spec["replicaSpecs"]).values()
    return [role["template"] for role in roles]


def container(kind: str, document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = templates(kind, document)[0]["spec"]["containers"][0]
    return found


def test_a_pytorchjob_has_what_the_training_operator_fixes() -> None:
    found = manifest("kubernetes", chip="mlu590", queue="large")
    assert (found["apiVersion"], found["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = found["spec"]["pytorchReplicaSpecs"]
    assert {role: spec["replicas"] for role, spec in replicas.items()} == {"Master": 1, "Worker": 7}
    assert found["spec"]["nprocPerNode"] == "8"
    policy = found["spec"]["runPolicy"]
    assert policy["schedulingPolicy"] == {"minAvailable": 8, "queue": "large"}
    assert policy["backoffLimit"] == 80  # ten starts of eight Pods
    pod = container("kubernetes", found)
    assert pod["name"] == "pytorch" and pod["ports"] == [{"name": "pytorchjob-port", "containerPort": 29500}]
    assert pod["resources"]["limits"] == pod["resources"]["requests"] == {"cambricon.com/mlu": 8}


def test_an_ascendjob_has_what_its_operator_fixes() -> None:
    selector = {"accelerator-type": "module-910b-8"}
    found = manifest("ascendjob", node_selector=selector, annotations={"sp-block": "64"})
    assert (found["apiVersion"], found["kind"]) == ("mindxdl.gitee.com/v1", "AscendJob")
    labels = found["metadata"]["labels"]
    assert labels["framework"] == "pytorch" and labels["ring-controller.atlas"] == "ascend-910b"
    assert found["metadata"]["annotations"] == {"sp-block": "64"}
    assert found["spec"]["schedulerName"] == "volcano"
    assert found["spec"]["runPolicy"]["schedulingPolicy"] == {"minAvailable": 8, "queue": "default"}
    for template in templates("ascendjob", found):
        assert template["metadata"]["labels"] == {"ring-controller.atlas": "ascend-910b"}
        assert template["spec"]["nodeSelector"] == selector
    pod = container("ascendjob", found)
    assert pod["name"] == "ascend" and pod["ports"][0]["name"] == "ascendjob-port"
    assert pod["resources"]["limits"] == {"huawei.com/Ascend910": 8}
    fields = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in pod["env"] if "valueFrom" in entry
    }
    assert fields["ASCEND_VISIBLE_DEVICES"] == "metadata.annotations['huawei.com/Ascend910']"
    assert "/usr/local/Ascend/driver" in {mount["mountPath"] for mount in pod["volumeMounts"]}


def test_the_first_generation_has_its_own_label() -> None:
    assert manifest("ascendjob", chip="ascend-910a")["metadata"]["labels"]["ring-controller.atlas"] == "ascend-910"


def test_a_volcano_job_numbers_nodes_through_its_groups() -> None:
    groups = [
        {"name": "a", "chip": "ascend-910b3", "nodes": 8, "devices_per_node": 8},
        {"name": "b", "chip": "ascend-910c-die", "nodes": 4, "devices_per_node": 16},
    ]
    two = Cluster.model_validate({"name": "c", "groups": groups, "launch": {"kind": "volcano", **CONTAINER}})
    spec = documents(kubernetes.volcanojob(job_of(large_recipe(), two)))[1]["spec"]
    assert spec["minAvailable"] == 12
    commands = [task["template"]["spec"]["containers"][0]["command"][2] for task in spec["tasks"]]
    for command, first, processes in zip(commands, (0, 8), (8, 16), strict=True):
        assert f'rank="$(({first} + VC_TASK_INDEX))"' in command
        assert f"--nnodes=12 --nproc-per-node={processes}" in command
        assert "--rdzv-endpoint=telechat2-115b-nodes0-0.telechat2-115b:29500" in command
    assert {policy["event"]: policy["action"] for policy in spec["policies"]} == {
        "PodFailed": "RestartJob",
        "PodEvicted": "RestartJob",
    }


@pytest.mark.parametrize(
    ("chip", "resource"),
    [
        ("ascend-910c-die", "huawei.com/Ascend910"), ("mlu370-x8", "cambricon.com/mlu"), ("a100-80g", "nvidia.com/gpu"),
        ("mi300x", "amd.com/gpu"), ("mtt-s4000", "mthreads.com/gpu"), ("metax-c500", "metax-tech.com/gpu"),
    ],
)  # fmt: skip
def test_devices_are_asked_for_by_the_names_of_their_plug_ins(chip: str, resource: str) -> None:
    assert container("volcano", manifest("volcano", chip=chip))["resources"]["limits"] == {resource: 8}


def test_a_cpu_is_not_asked_for() -> None:
    assert "resources" not in container("volcano", manifest("volcano", chip="cpu-generic", nodes=8))


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_travels_with_the_job(kind: str) -> None:
    found = job(kind)
    recipe, running = documents(MANIFESTS[kind](found))
    assert parse_recipe(yaml.safe_load(recipe["data"]["recipe.yaml"]), "map") == found.recipe
    pod = container(kind, running)
    assert "-m anychip train /etc/anychip/recipe.yaml" in pod["command"][2]
    assert {"name": "recipe", "mountPath": "/etc/anychip"} in pod["volumeMounts"]
    assert {"name": "recipe", "configMap": {"name": recipe["metadata"]["name"]}} in templates(kind, running)[0]["spec"][
        "volumes"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_variables_carry_their_reasons(kind: str) -> None:
    text = MANIFESTS[kind](job(kind))
    assert "- name: HCCL_CONNECT_TIMEOUT  # Default 120 s" in text
    check(text)  # comments change nothing
    assert "&id" not in text


def test_every_start_meets_under_its_own_id() -> None:
    first, second = (container("kubernetes", manifest("kubernetes"))["command"][2] for _ in range(2))
    assert first != second
    environment = container("volcano", manifest("volcano"))["env"]
    generation = {"fieldRef": {"fieldPath": "metadata.annotations['volcano.sh/job-version']"}}
    assert {"name": "ANYCHIP_JOB_VERSION", "valueFrom": generation} in environment


@pytest.mark.parametrize("kind", KINDS)
def test_no_variable_of_a_pod_is_one_that_fences_training(kind: str) -> None:
    names = {entry["name"] for entry in container(kind, manifest(kind))["env"]}
    assert not names & {GENERATION_VARIABLE, LEASE_VARIABLE}


def test_one_node_has_no_workers() -> None:
    for kind, key in (("kubernetes", "pytorchReplicaSpecs"), ("ascendjob", "replicaSpecs")):
        alone = job(kind, "parallel.pipeline_parallel=1", nodes=1)
        assert set(documents(MANIFESTS[kind](alone))[1]["spec"][key]) == {"Master"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_refuses_what_kubernetes_would_drop_or_refuse(kind: str) -> None:
    good = manifest(kind)
    pod = ("containers", 0)
    for path, value in [
        (("metadata", "name"), "Not_a_label"),
        (("spec", "replicas"), 3),
        (("spec", "run_policy"), {}),
        (("template", "spec", "nodeselector"), {}),
        (("template", "spec", *pod, "resources", "limits", "huawei.com/Ascend910"), 0),
        (("template", "spec", *pod, "env", 0, "value"), "two values"),
        (("template", "spec", *pod, "volumeMounts", 0, "name"), "nowhere"),
        (("template", "spec", "volumes", 0, "emptyDir"), {"medium": "Memory"}),
    ]:
        bad = copy.deepcopy(good)
        part: Any = templates(kind, bad)[0] if path[0] == "template" else bad
        *keys, last = path[1:] if path[0] == "template" else path
        for key in keys:
            part = part[key]
        part[last] = value
        with pytest.raises(ValidationError):
            manifest_text([bad])


def test_a_field_that_kubernetes_would_refuse_is_a_users_mistake(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    groups = [{"name": "a", "chip": "mlu590", "nodes": 8}]
    launch = {"kind": "kubernetes", **CONTAINER, "namespace": "Team_A"}
    file.write_text(yaml.safe_dump({"name": "c", "groups": groups, "launch": launch}), encoding="utf-8")
    with pytest.raises(InputError, match="launch \\(kubernetes\\): Kubernetes would refuse 'Team_A'"):
        write(LARGE, file, SPLIT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chip", ["ascend-910b3", "ascend-910c-die"])
def test_pods_and_maps_are_valid_kubernetes(kind: str, chip: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    found: Job = job(kind, chip=chip, network_interface="eth0", node_selector={"a": "b"}, annotations={"c": "d e"})
    recipe, running = documents(MANIFESTS[kind](found))
    validate(recipe, "1.31", strict=True)
    for template in templates(kind, running):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})}}
        validate({**pod, "spec": template["spec"]}, "1.31", strict=True)
