"""Shell text that survives odd names, and starting it with or without a client."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import cluster, documents, job, large_recipe, write_cluster
from tiny_run import write_tiny_recipe

from anychip.cli import main
from anychip.errors import AnychipError, InputError
from anychip.launch import slurm, torchrun
from anychip.launch.command import make_token
from anychip.launch.job import job_of
from anychip.launch.submit import submit
from anychip.launch.write import MANIFESTS, Written, write
from anychip.recipe.cluster import Cluster
from anychip.supervise.channel import read_token

ODD = {
    "python": "/opt/my env/bin/python $HOME",
    "working_directory": "/data/it's here",
    "environment": {"A": "$(b) 'c'"},
}


def texts(**launch: Any) -> dict[str, str]:
    """Every shell text that is written for a large job."""
    found = dict(torchrun.scripts(job("torchrun", **launch)))
    found["sbatch"] = slurm.script(job("slurm", **launch), Path("/data/it's/recipe.yaml"))
    for kind, write_manifest in MANIFESTS.items():
        launched = job(kind, **{**launch, "working_directory": "/data"})
        spec = documents(write_manifest(launched))[1]["spec"]
        role = (
            spec["tasks"][0]
            if kind == "volcano"
            else (spec.get("pytorchReplicaSpecs") or spec["replicaSpecs"])["Master"]
        )
        found[kind] = role["template"]["spec"]["containers"][0]["command"][2]
    return found


@pytest.mark.parametrize("launch", [{}, ODD, {"network_interface": "enp1"}], ids=["plain", "odd", "interface"])
def test_scripts_are_shell(launch: dict[str, Any]) -> None:
    for name, text in texts(**launch).items():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and not done.stderr, (name, done.stderr)


def words_of(text: str) -> list[str]:
    """The words of a torchrun line after the shell has read it."""
    printed = text[text.index("exec ") + 5 :]
    done = subprocess.run(
        ["bash", "-c", f"node=3 processes=8 generation=g here=/job; printf '%s\\n' {printed}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_odd_names_stay_single_words() -> None:
    text = torchrun.scripts(job("torchrun", **ODD))["node.sh"]
    assert words_of(text)[0] == ODD["python"]
    assert "cd '/data/it'\"'\"'s here'" in text
    exported = next(line for line in text.splitlines() if " export A=" in line)
    done = subprocess.run(["bash", "-c", f'{exported}\nprintf %s "$A"'], capture_output=True, text=True, check=True)
    assert done.stdout == "$(b) 'c'"


def test_a_torchrun_line_names_everything() -> None:
    words = words_of(torchrun.scripts(job("torchrun", network_interface="enp1"))["node.sh"])
    assert words[0] == sys.executable
    assert words[1:3] == ["-m", "torch.distributed.run"] and words[-4:] == [
        "-m",
        "anychip",
        "train",
        "/job/recipe.yaml",
    ]
    assert {"--nnodes=8", "--nproc-per-node=8", "--max-restarts=0", "--rdzv-endpoint=node0:29500"} <= set(words)
    assert "--rdzv-id=telechat2-115b-g" in words
    (conf,) = (word for word in words if word.startswith("--rdzv-conf="))
    assert re.fullmatch(r"--rdzv-conf=rank=3,timeout=\d{4},interface=enp1", conf)


def test_a_variable_that_is_set_stays() -> None:
    text = torchrun.scripts(job("torchrun"))["node.sh"]
    line = next(line for line in text.splitlines() if "HCCL_BUFFSIZE" in line)
    for given, wanted in (("", "200"), ("HCCL_BUFFSIZE=64; ", "64")):
        script = f'{given}{line}\nprintf %s "$HCCL_BUFFSIZE"'
        assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == wanted
    assert "MiB a communicator" in line  # the reason stands beside it


def test_an_sbatch_script_asks_for_what_the_cluster_file_names() -> None:
    text = slurm.script(
        job("slurm", partition="train", account="llm", time_limit="7-00:00:00", gres="npu:8", nodes=16), Path("/r.yaml")
    )
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert found["nodes"] == "16" and found["ntasks-per-node"] == "1" and "exclusive" in found and "requeue" in found
    wanted = {"partition": "train", "account": "llm", "time": "7-00:00:00", "gres": "npu:8"}
    assert wanted.items() <= found.items()
    assert text.index("#SBATCH --requeue") < text.index("set -euo pipefail")  # Slurm stops reading at the first command


def test_nodes_of_two_groups_run_different_numbers_of_processes() -> None:

    groups = [
        {"name": "a", "chip": "ascend-910b3", "nodes": 8, "devices_per_node": 8},
        {"name": "b", "chip": "ascend-910c-die", "nodes": 4, "devices_per_node": 16},
    ]
    hosts = [f"node{number}" for number in range(12)]
    two = Cluster.model_validate({"name": "c", "groups": groups, "launch": {"kind": "torchrun", "hosts": hosts}})
    text = torchrun.scripts(job_of(large_recipe(), two))["node.sh"]
    (line,) = (line for line in text.splitlines() if "processes=8" in line)
    for node, wanted in ((0, "8"), (7, "8"), (8, "16"), (11, "16")):
        script = f'node={node}; {line}; printf %s "$processes"'
        assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == wanted


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write(write_tiny_recipe(tmp_path), write_cluster(tmp_path, kind="slurm"), out=tmp_path / "job")


def client(folder: Path, text: str) -> str:
    """A folder for PATH that holds an sbatch of this text."""
    path = folder / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path.parent)


def test_submitting_without_the_client_says_what_to_do(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        InputError, match=r"sbatch is not installed on this machine\. Copy .* run `sbatch .*job.sbatch`"
    ):
        submit(written)


def test_submitting_hands_the_file_to_the_client(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", client(tmp_path, 'echo "Submitted $1"'))
    submit(written)
    assert capsys.readouterr().out == f"Submitted {written.folder}/job.sbatch\n"


def test_a_client_that_refuses_is_quoted(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", client(tmp_path, "echo 'invalid partition' >&2; exit 1"))
    with pytest.raises(AnychipError, match="sbatch refused: invalid partition The files stay in"):
        submit(written)


def test_hosts_that_are_other_machines_are_not_started_from_here(tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, kind="torchrun", hosts=["127.0.0.2", "node7"])
    with pytest.raises(InputError, match=r"node7 is another one\. Run `bash .*start.sh` where ssh reaches every host"):
        submit(write(write_tiny_recipe(tmp_path), cluster, out=tmp_path / "job"))


def test_the_verb_writes_and_says_how_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, cluster = write_tiny_recipe(tmp_path), write_cluster(tmp_path, kind="slurm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["anychip", "launch", str(recipe), "--cluster", str(cluster)])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and f"start it: sbatch {tmp_path}/launch/tiny/job.sbatch" in out
    assert (tmp_path / "launch" / "tiny" / "recipe.yaml").is_file()


def test_a_recipe_that_does_not_fit_ends_with_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, cluster = write_tiny_recipe(tmp_path), write_cluster(tmp_path, kind="slurm")
    words = ["launch", str(recipe), "--cluster", str(cluster), "--set", "parallel.tensor_parallel=4"]
    monkeypatch.setattr("sys.argv", ["anychip", *words, "--out", str(tmp_path / "job")])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "needs a multiple of 4 devices; cluster two has 2. Give group cpu 4 nodes, or choose" in error
    assert not (tmp_path / "job").exists()


def test_supervised_scripts_are_shell_and_what_the_verb_takes(tmp_path: Path) -> None:
    large = large_recipe()
    for kind in ("torchrun", "slurm"):
        shape = job(kind, network_interface="enp1")
        supervised = replace(shape, recipe=large, least_hosts=6)
        texts = (
            torchrun.scripts(supervised) if kind == "torchrun" else {"": slurm.script(supervised, tmp_path / "r.yaml")}
        )
        for text in texts.values():
            done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        text = "".join(texts.values())
        assert "anychip supervise" in text
        assert "--nodes 6:8 --processes" in text
        assert "--interface enp1" in text
        assert "torch.distributed.run" not in text
    token = tmp_path / "it's a token"
    for _ in range(2):  # the second time it stays as it is
        before = token.read_bytes() if token.exists() else None
        subprocess.run(["bash", "-c", make_token(shlex.quote(str(token)))], check=True)
        assert before in (None, token.read_bytes())
    assert len(read_token(token)) == 64


def test_supervised_by_more_hosts_than_there_are_or_in_pods_is_refused() -> None:
    for kind, least in (("torchrun", 9), ("volcano", 2)):
        with pytest.raises(InputError, match="--supervise"):
            job_of(large_recipe(), cluster(kind), least)
