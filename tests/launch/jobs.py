"""Recipes, clusters and jobs that the tests of launch share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from anychip.launch.job import Job, job_of
from anychip.recipe import Recipe, load_recipe
from anychip.recipe.cluster import Cluster

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "clusters").glob("*.yaml"))
LARGE = ROOT / "recipes" / "telechat2-115b.yaml"
# Layouts that divide the model and the batch on each example cluster.
SPLIT = ["parallel.tensor_parallel=8", "parallel.pipeline_parallel=8", "training.global_batch_size=12288"]
CONTAINER = {"image": "registry.example/anychip:1", "volume_claim": "data"}


def large_recipe(*overrides: str) -> Recipe:
    return load_recipe(LARGE, [*SPLIT, *overrides])


def cluster(kind: str, chip: str = "ascend-910b3", nodes: int = 8, processes: int = 8, **launch: Any) -> Cluster:
    """A cluster of one group, with what its launcher asks for."""
    needs = CONTAINER if kind in ("kubernetes", "volcano", "ascendjob") else {}
    if kind == "torchrun":
        needs = {"hosts": [f"node{number}" for number in range(nodes)]}
    group = {"name": "a", "chip": chip, "nodes": nodes, "devices_per_node": processes}
    return Cluster.model_validate({"name": "c", "groups": [group], "launch": {"kind": kind, **needs, **launch}})


def job(kind: str, *overrides: str, **shape: Any) -> Job:
    return job_of(large_recipe(*overrides), cluster(kind, **shape))


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def write_cluster(folder: Path, **launch: Any) -> Path:
    """A file of two hosts of one CPU process each."""
    path = folder / "cluster.yaml"
    groups = [{"name": "cpu", "chip": "cpu-generic", "nodes": 2, "devices_per_node": 1}]
    path.write_text(yaml.safe_dump({"name": "two", "groups": groups, "launch": launch}), encoding="utf-8")
    return path
