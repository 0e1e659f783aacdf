"""An sbatch script: one task a node, which runs torchrun."""

from __future__ import annotations

import shlex
from pathlib import Path

from anychip.launch.command import exports, make_token, supervise_line, torchrun_line
from anychip.launch.environment import variables
from anychip.launch.job import Job


def script(job: Job, recipe: Path) -> str:
    """The script's text. `recipe` must be reachable at this path from the nodes."""
    launch, (group,) = job.launch, job.groups
    options = {
        "job-name": job.name,
        "nodes": str(group.count),
        "ntasks-per-node": "1",
        "gres": launch.gres,
        "partition": launch.partition,
        "account": launch.account,
        "time": launch.time_limit,
        "output": f"{job.name}-%j.log",
        "open-mode": "append",
    }
    directives = "\n".join(f"#SBATCH --{name}={value}" for name, value in options.items() if value)
    endpoint, token = f'"$head:{launch.port}"', shlex.quote(str(recipe.parent / "token"))
    if job.least_hosts:
        # A task that ends does not end the others, and one of them is enough to keep the job.
        step = f"{make_token(token)}\nexec srun --kill-on-bad-exit=0 --no-kill --label"
        line = supervise_line(
            job, node='"$SLURMD_NODENAME"', processes=str(group.processes), coordinator=endpoint,
            recipe=shlex.quote(str(recipe)), token=token, bind="",
        )  # fmt: skip
    else:
        step = "exec srun --kill-on-bad-exit=1 --label"
        line = torchrun_line(
            job, node='"$SLURM_NODEID"', processes=str(group.processes), endpoint=endpoint,
            generation='"$generation"', recipe=shlex.quote(str(recipe)),
        )  # fmt: skip
    return f"""#!/usr/bin/env bash
# {job.recipe.name}: {job.world_size} processes on {job.nodes} nodes. Written by `anychip launch`.
{directives}
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail
cd {shlex.quote(launch.working_directory or str(Path.cwd()))}
{exports(variables(job))}
# A job that Slurm starts again keeps its number: the count of restarts tells its processes from those left before.
export generation=$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
{_head(job)}
export head
{step} bash -c {shlex.quote("exec " + line)}
"""


def _head(job: Job) -> str:
    """The first node by name; by its address on the named interface where there is one."""
    first = 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    interface = job.launch.network_interface
    if interface is None:
        return first
    ask = f"ip -4 -oneline address show dev {shlex.quote(interface)} | awk '{{split($4, a, \"/\"); print a[1]}}'"
    return f'{first}\nhead=$(srun --nodes=1 --ntasks=1 --nodelist="$head" bash -c {shlex.quote(ask)})'
