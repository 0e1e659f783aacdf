"""Starting what launch wrote, without a cluster: stand-ins for the training and for Slurm, and what is left after."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

# Stands in for the interpreter: checks that training would start, and starts a few collectives instead.
_PYTHON = """#!{python}
import os, sys
words = sys.argv[1:]
at = words.index("anychip")
assert words[:2] == ["-m", "torch.distributed.run"] and words[at - 1 : at + 2] == ["-m", "anychip", "train"], words
assert os.path.isfile(words[at + 2]), words
os.execv({python!r}, [{python!r}, *words[: at - 1], {script!r}])
"""

_RANK = """
import json, os, pathlib, sys, time
import torch, torch.distributed as dist
rank = int(os.environ["RANK"])
if os.environ.get("TEST_FAILS") == str(rank):
    sys.exit(7)
if os.environ.get("TEST_FAILS"):
    time.sleep(120)
dist.init_process_group("gloo")
total = torch.tensor(float(rank + 1))
dist.all_reduce(total)
names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ANYCHIP_CHIP", "MINE")
told = {name: os.environ.get(name) for name in names}
pathlib.Path(os.environ["TEST_OUT"], f"{rank}.json").write_text(json.dumps({"sum": total.item(), **told}))
dist.destroy_process_group()
"""

# Knows the long options that sbatch(1), srun(1) and scontrol(1) document, as far as we use them.
_SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
known = {{"job-name", "nodes", "ntasks-per-node", "gres", "partition", "account", "time", "output", "open-mode",
         "exclusive", "requeue"}}
assert set(options) <= known, options
assert options["nodes"] == "2" and options["ntasks-per-node"] == "1"
print("Submitted batch job 42", flush=True)
sys.exit(subprocess.run(["bash", sys.argv[1]], env={{**os.environ, "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[0-1]",
         "SLURM_RESTART_COUNT": "3"}}).returncode)
"""
_SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
known = ("--kill-on-bad-exit=1", "--label", "--nodes=1", "--ntasks=1", "--nodelist=")
while words[0].startswith("--"):
    assert words[0].startswith(known), words[0]
    alone = words.pop(0) == "--nodes=1" or "alone" in locals() and alone
count = 1 if alone else 2
nodes = [subprocess.Popen(words, env={{**os.environ, "SLURM_NODEID": str(n)}}) for n in range(count)]
sys.exit(max(node.wait() for node in nodes))
"""
_SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames n[0-1]" ] || exit 1
printf '127.0.0.2\\n127.0.0.3\\n'
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def programs(folder: Path) -> Path:
    """A folder for PATH with python, sbatch, srun and scontrol."""
    folder.mkdir(exist_ok=True)
    script = folder / "rank.py"
    script.write_text(_RANK, encoding="utf-8")
    for name, text in {"python": _PYTHON, "sbatch": _SBATCH, "srun": _SRUN, "scontrol": _SCONTROL}.items():
        path = folder / name
        path.write_text(text.format(python=sys.executable, script=str(script)), encoding="utf-8")
        path.chmod(0o755)
    return folder


def run(folder: Path, *command: str, seconds: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder` with a hard limit; it and all it started are killed when the limit passes."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TEST_OUT": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words:
            found.append(words)
    return found


def two_networks(commands: tuple[str, str]) -> list[str]:
    """A command that runs one command in each of two network namespaces, which a virtual cable joins: hosts 10.77.0.1
    and 10.77.0.2, each with an interface fabric0 and a loopback of its own. Needs no root where user namespaces are
    allowed; everything in it dies with it."""
    script = textwrap.dedent(
        """
        set -eu
        mount -t tmpfs none /run
        ip netns add host0; ip netns add host1
        ip link add fabric0 netns host0 type veth peer name fabric0 netns host1
        for n in 0 1; do
            ip -n host$n address add 10.77.0.$((n + 1))/24 dev fabric0
            ip -n host$n link set fabric0 up; ip -n host$n link set lo up
        done
        nsenter --net=/run/netns/host0 bash -c "$1" & first=$!
        nsenter --net=/run/netns/host1 bash -c "$2" & second=$!
        wait $first; wait $second
        """
    )
    spaces = ["--user", "--map-root-user", "--net", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    return ["unshare", *spaces, "bash", "-c", script, "bash", *commands]
