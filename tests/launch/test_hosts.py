"""Jobs over several hosts on one machine: loopback addresses, network namespaces, and stand-ins for schedulers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import CONTAINER, documents, write_cluster
from starts import free_port, left_over, programs, run, two_networks
from tiny_run import finish, write_tiny_recipe

from anychip.launch.write import write

HOSTS = ["127.0.0.2", "127.0.0.3"]
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe with its data prepared."""
    folder = tmp_path_factory.mktemp("hosts")
    write_tiny_recipe(folder, steps=STEPS, eval_interval=0)
    finish(folder, "data", "prepare", "tiny.yaml")
    return folder


def losses(folder: Path) -> list[float]:
    lines = (folder / "runs" / "tiny" / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def start_training(folder: Path, command: list[str]) -> list[float]:
    done = run(folder, *command, seconds=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not left_over(folder)
    return losses(folder)


@pytest.fixture(scope="module")
def trained_on_loopback(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the job that `anychip launch --submit` starts on two loopback addresses."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("loopback") / "copy")
    write_cluster(copy, kind="torchrun", hosts=HOSTS, port=free_port())
    command = ["launch", "tiny.yaml", "--cluster", "cluster.yaml", "--submit"]
    return start_training(copy, [sys.executable, "-m", "anychip", *command])


def test_two_loopback_hosts_train(trained_on_loopback: list[float]) -> None:
    assert len(trained_on_loopback) == STEPS and all(map(math.isfinite, trained_on_loopback))
    assert trained_on_loopback[-1] < trained_on_loopback[0]


@pytest.mark.slow
def test_two_supervised_loopback_hosts_train_the_same(
    folder: Path, trained_on_loopback: list[float], tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_cluster(copy, kind="torchrun", hosts=HOSTS, port=free_port())
    command = ["launch", "tiny.yaml", "--cluster", "cluster.yaml", "--supervise", "1", "--submit"]
    assert start_training(copy, [sys.executable, "-m", "anychip", *command]) == trained_on_loopback


def test_two_hosts_with_networks_of_their_own_train_the_same(
    folder: Path, trained_on_loopback: list[float], tmp_path: Path
) -> None:
    probe = subprocess.run(two_networks(("true", "true")), capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"network namespaces are not allowed here: {probe.stderr.strip()[:200]}")
    copy = shutil.copytree(folder, tmp_path / "copy")
    hosts = {"hosts": ["10.77.0.1", "10.77.0.2"], "network_interface": "fabric0", "working_directory": str(copy)}
    cluster = write_cluster(copy, kind="torchrun", **hosts)
    script = write(copy / "tiny.yaml", cluster, out=copy / "job").folder / "node.sh"
    assert start_training(copy, two_networks((f"bash {script} 0 g", f"bash {script} 1 g"))) == trained_on_loopback


def start(tmp_path: Path, kind: str, **launch: Any) -> tuple[Path, list[Path]]:
    """Write a job whose interpreter is the stand-in; returns PATH's folder and the files."""
    tools = programs(tmp_path / "bin")
    cluster = write_cluster(tmp_path, kind=kind, port=free_port(), python=str(tools / "python"), **launch)
    recipe = write_tiny_recipe(tmp_path)
    return tools, list(write(recipe, cluster, out=tmp_path / "job").files)


def told(tmp_path: Path) -> list[dict[str, Any]]:
    found = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert [(rank["sum"], rank["WORLD_SIZE"], rank["GROUP_RANK"]) for rank in found] == [(3, "2", "0"), (3, "2", "1")]
    assert not left_over(tmp_path)
    return found


def test_a_node_that_fails_ends_the_others(tmp_path: Path) -> None:
    _, (_, _, script) = start(tmp_path, "torchrun", hosts=HOSTS)
    began = time.monotonic()
    done = run(tmp_path, "bash", str(script), TEST_FAILS="1")
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert not left_over(tmp_path)


def test_an_sbatch_script_starts_one_task_a_node(tmp_path: Path) -> None:
    tools, (_, script) = start(
        tmp_path, "slurm", partition="train", network_interface="lo", environment={"MINE": "it's"}
    )
    path = f"{tools}:/usr/sbin:/usr/bin:/bin"
    done = run(tmp_path, "sbatch", str(script), PATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = told(tmp_path)
    assert first["TORCHELASTIC_RUN_ID"] == second["TORCHELASTIC_RUN_ID"] == "tiny-42-3"
    assert first["ANYCHIP_CHIP"] == "cpu" and first["MINE"] == "it's"
    assert first["MASTER_ADDR"] == "127.0.0.1"  # the address of the interface, not the node's name


@pytest.mark.parametrize("kind", ["kubernetes", "volcano"])
def test_a_pods_command_starts_its_node(tmp_path: Path, kind: str) -> None:
    """The container's own command, with the variables that the operator would set."""
    _, (recipe, manifest) = start(tmp_path, kind, **CONTAINER)
    text = manifest.read_text(encoding="utf-8").replace("/etc/anychip", str(recipe.parent))
    spec = documents(text)[1]["spec"]
    role = spec["tasks"][0] if kind == "volcano" else spec["pytorchReplicaSpecs"]["Worker"]
    container = role["template"]["spec"]["containers"][0]
    port = container["ports"][0]["containerPort"]
    command = [word.replace("tiny-nodes0-0.tiny", "127.0.0.2") for word in container["command"]]
    own = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    operator = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port), "ANYCHIP_JOB_VERSION": "5", "WORLD_SIZE": "2"}
    pods = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={
                "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "TEST_OUT": str(tmp_path), **own, **operator,
                "RANK": str(node), "VC_TASK_INDEX": str(node), "ANYCHIP_POD_IP": HOSTS[node],
            },
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        assert [pod.wait(timeout=100) for pod in pods] == [0, 0]
    finally:
        for pod in pods:
            pod.kill()
    assert told(tmp_path)[0]["TORCHELASTIC_RUN_ID"].startswith("tiny-5" if kind == "volcano" else "tiny-")


def test_the_written_recipe_is_the_overridden_one(tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, kind="torchrun", hosts=HOSTS)
    written = write(write_tiny_recipe(tmp_path), cluster, ["training.steps=3", "seed=5"], tmp_path / "job")
    found = yaml.safe_load((written.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert (found["training"]["steps"], found["seed"]) == (3, 5)
