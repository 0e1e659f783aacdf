"""What cannot be started is refused before anything is written, with the nearest that can."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from jobs import CLUSTERS, CONTAINER, LARGE, SPLIT, cluster, job, large_recipe

from anychip.errors import InputError
from anychip.launch.environment import variables
from anychip.launch.job import job_of
from anychip.launch.write import write
from anychip.recipe.cluster import Cluster, load_cluster


def test_nodes_and_processes_follow_from_the_cluster() -> None:
    found = job("volcano", nodes=16)
    assert (found.nodes, found.world_size, found.facts.vendor) == (16, 128, "ascend")


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        ((), 12, "needs a multiple of 64 devices; cluster c has 96. Give group a 8 or 16 nodes, or choose"),
        ((), 4, "cluster c has 32. Give group a 8 nodes, or choose other degrees"),
        (("parallel.data_parallel_replicate=4",), 8, "needs 256 devices; cluster c has 64. Set parallel.data_parallel"),
        (("parallel.data_parallel_replicate=4",), 8, "_replicate=1, or give group a 32 nodes, or choose other"),
        (("parallel.data_parallel_replicate=4",), 9, "needs 256 devices; cluster c has 72. Give group a 32 nodes"),
        (("parallel.tensor_parallel=3",), 12, "tensor_parallel 3 does not divide"),
        (("training.global_batch_size=7",), 128, "global_batch_size 7 does not divide into 16 readers"),
    ],
)
def test_a_layout_of_another_size_is_refused(overrides: tuple[str, ...], nodes: int, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        job("volcano", *overrides, nodes=nodes)


@pytest.mark.parametrize("nodes", [8, 16])
def test_the_nearest_sizes_it_names_are_accepted(nodes: int) -> None:
    assert job("volcano", nodes=nodes).world_size % 64 == 0


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("torchrun", {"hosts": ["a", "b"]}, "launch.hosts: 2 hosts are named for 8 nodes."),
        ("torchrun", {"hosts": ["a"] * 8}, "launch.hosts: a host is named twice."),
        ("kubernetes", {"image": None}, "launch.image: kubernetes needs a container image."),
        ("volcano", {"image": None}, "launch.image: volcano needs a container image."),
        ("ascendjob", {"volume_claim": None}, "launch.volume_claim: ascendjob needs a volume"),
        ("ascendjob", {"chip": "mlu590"}, "an AscendJob is for chips that its operator knows; MLU590 is none"),
        ("kubernetes", {"chip": "ascend-950pr"}, "what Kubernetes calls Ascend 950PR is not known to us"),
        ("slurm", {"chip": "ascend-910c-package"}, "is a package of 2 devices"),
        ("slurm", {"chip": "ascend-910"}, "is not a chip of the catalogue"),
        ("slurm", {"chip": "tpu-v4"}, "anychip has no backend for Google"),
    ],
)
def test_what_a_launcher_lacks_is_named(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        job(kind, **changes)


def two_groups(kind: str, second: str, **launch: Any) -> Cluster:
    groups = [
        {"name": "a", "chip": "ascend-910b3", "nodes": 8, "devices_per_node": 8},
        {"name": "b", "chip": second, "nodes": 4, "devices_per_node": 16},
    ]
    return Cluster.model_validate({"name": "c", "groups": groups, "launch": {"kind": kind, **CONTAINER, **launch}})


def test_groups_without_a_common_library_are_refused() -> None:
    with pytest.raises(InputError, match=r"no collective library in common \(a has HCCL, b has CNCL\)"):
        job_of(large_recipe(), two_groups("volcano", "mlu590"))


def test_groups_of_one_vendor_are_started_together_where_the_launcher_can() -> None:
    assert job_of(large_recipe(), two_groups("volcano", "ascend-910c-die")).world_size == 128
    for kind in ("slurm", "kubernetes", "ascendjob"):
        with pytest.raises(InputError, match=f"{kind} starts nodes of one kind; the cluster has 2 groups"):
            job_of(large_recipe(), two_groups(kind, "ascend-910c-die"))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_example_cluster_is_started_or_refused_with_the_reason(path: Path, tmp_path: Path) -> None:
    """Those that name a launcher are written for; the mixtures are for planning and say what they lack."""
    overrides = SPLIT if "cpu" not in path.stem else []
    if path.stem.startswith("mixed"):
        with pytest.raises(InputError, match=r"no collective library in common|0 hosts are named"):
            write(LARGE, path, overrides, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    written = write(LARGE, path, overrides, tmp_path)
    assert written.job.nodes == sum(group.nodes for group in load_cluster(path).groups)
    assert all(file.is_file() for file in written.files)


def test_the_vendors_variables_come_with_reasons_and_the_files_have_the_last_word() -> None:
    found = {
        setting.name: setting
        for setting in variables(
            job("slurm", network_interface="enp1", environment={"HCCL_BUFFSIZE": "120", "MINE": "a b"}, nodes=1024)
        )
    }
    assert found["ANYCHIP_CHIP"].value == "ascend" and found["OMP_NUM_THREADS"].value == "1"
    assert int(found["HCCL_CONNECT_TIMEOUT"].value) > 300  # grows with the number of processes
    assert found["HCCL_SOCKET_IFNAME"].value == found["GLOO_SOCKET_IFNAME"].value == "enp1"
    assert (found["HCCL_BUFFSIZE"].value, found["MINE"].value) == ("120", "a b")
    assert all(setting.why for setting in found.values())


@pytest.mark.parametrize("name", ["Tele_Chat.115B", "115b", "x" * 80])
def test_names_become_dns_labels(name: str) -> None:
    label = job_of(large_recipe(f"name={name}"), cluster("slurm")).name
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,42}[a-z0-9])?", label)


@pytest.mark.parametrize(
    "launch",
    [{"partition": "a\nb"}, {"hosts": ["-oProxyCommand=x"]}, {"environment": {"A B": "1"}}, {"python": "a\nb"}],
)
def test_text_that_would_end_a_line_of_a_script_is_refused(launch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="should match pattern"):
        cluster("slurm", **launch)
