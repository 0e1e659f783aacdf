"""Cluster files that cannot be meant, and chips without figures, get a message that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from anychip.errors import InputError
from anychip.plan.machine import machines_of
from anychip.recipe.cluster import load_cluster

GROUP = "schema_version: 1\nname: x\ngroups:\n  - {name: a, chip: ascend-910b3, nodes: 4, devices_per_node: 8%s}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GROUP % ", inter_node_gbit_per_s: .inf", "inter_node_gbit_per_s is inf"),
        (GROUP % ", intra_node_gb_per_s: .nan", "intra_node_gb_per_s is nan"),
        (GROUP % "" + "failures: {repair_hours: .inf}", "repair_hours is inf"),
        (GROUP % "" + "failures: {spare_nodes: 5}", "spare_nodes is 5, more than the 4 nodes"),
        ("", "A cluster file is a mapping with name and groups"),
        ("[]", "A cluster file is a mapping with name and groups"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_cluster(path)
    assert said in str(refused.value) and "recipe" not in str(refused.value)


def test_a_cluster_that_is_not_there_is_called_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Give the path of a cluster file, such as clusters/"):
        load_cluster(tmp_path / "none.yaml")


def test_the_shipped_cluster_of_cpus_says_how_it_is_planned() -> None:
    cluster = load_cluster(Path(__file__).parents[2] / "clusters" / "this-cpu.yaml")
    with pytest.raises(InputError) as refused:
        machines_of(cluster)
    assert "anychip bench chip --out chip.json" in str(refused.value)
    assert "plan --bench chip.json in place of --cluster" in str(refused.value)
