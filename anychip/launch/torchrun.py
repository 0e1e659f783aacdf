"""Scripts for hosts without a scheduler: node.sh runs on every node, start.sh starts it on all of them."""

from __future__ import annotations

import ipaddress
import shlex
from itertools import accumulate
from pathlib import Path

from anychip.launch.command import exports, make_token, supervise_line, torchrun_line
from anychip.launch.environment import variables
from anychip.launch.job import Job

RECIPE = "recipe.yaml"


def scripts(job: Job) -> dict[str, str]:
    """Texts by file name. They find the recipe beside themselves, so all nodes need the folder at the same path."""
    return {"node.sh": _node_script(job), "start.sh": _start_script(job)}


def is_local(host: str) -> bool:
    """Whether a host is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _node_script(job: Job) -> str:
    endpoint = f"{_bracketed(job.launch.hosts[0])}:{job.launch.port}"
    recipe = f'"$here/{RECIPE}"'
    if job.least_hosts:
        return _supervised_node_script(job, endpoint, recipe)
    line = torchrun_line(
        job, node='"$node"', processes='"$processes"', endpoint=endpoint, generation='"$generation"', recipe=recipe
    )
    return f"""#!/usr/bin/env bash
# One node of {job.recipe.name}: {job.world_size} processes on {job.nodes} nodes. Written by `anychip launch`.
# usage: node.sh NODE GENERATION, with NODE from 0 in the order of start.sh's hosts, and a GENERATION that is new for
# every start and the same on all nodes: processes left from an earlier start then find no one.
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
node=${{1:?usage: node.sh NODE GENERATION}}
generation=${{2:?usage: node.sh NODE GENERATION}}
{_processes(job)}
cd {shlex.quote(job.launch.working_directory or str(Path.cwd()))}
{exports(variables(job))}
exec {line}
"""


def _supervised_node_script(job: Job, endpoint: str, recipe: str) -> str:
    hosts = job.launch.hosts
    here = shlex.join(hosts) if all(map(is_local, hosts)) else ""  # they cannot be told apart by the way to the first
    line = supervise_line(
        job, node='"node$node"', processes='"$processes"', coordinator=endpoint, recipe=recipe,
        token='"$here/token"', bind=' --bind "${hosts[$node]}"' if here else "",
    )  # fmt: skip
    return f"""#!/usr/bin/env bash
# One node of {job.recipe.name} under `anychip supervise`. Written by `anychip launch`.
# usage: node.sh NODE, with NODE from 0 in the order of start.sh's hosts. An agent that was killed is started again; one
# that ended, for whatever reason, is not.
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
node=${{1:?usage: node.sh NODE}}
hosts=({here})
{_processes(job)}
cd {shlex.quote(job.launch.working_directory or str(Path.cwd()))}
{exports(variables(job))}
agent= stopping=
trap 'stopping=1; kill -TERM $agent 2>/dev/null || true' INT TERM HUP
while [ -z "$stopping" ]; do
    {line} &
    agent=$!
    code=0
    wait "$agent" || code=$?
    while kill -0 "$agent" 2>/dev/null; do
        code=0
        wait "$agent" || code=$?
    done
    [ "$code" -eq 137 ] || exit "$code"
    sleep 1
done
exit 130
"""


def _processes(job: Job) -> str:
    """Groups differ in how many processes a node runs; nodes are numbered through the groups in order."""
    *first, last = zip(job.groups, accumulate(group.count for group in job.groups), strict=True)
    lines = [f'if [ "$node" -lt {end} ]; then processes={group.processes}; else' for group, end in first]
    return " ".join([*lines, f"processes={last[0].processes}", *("; fi" for _ in first)]).replace(" ;", ";")


def _start_script(job: Job) -> str:
    hosts = "\n".join(f"    {shlex.quote(host)}" for host in job.launch.hosts)
    token = make_token('"$here/token"') + "\n" if job.least_hosts else ""
    ends = "this" if job.least_hosts else "one fails, or this"
    return f"""#!/usr/bin/env bash
# Starts {job.recipe.name} on all nodes: here for loopback addresses, over ssh elsewhere. Ends when all have ended;
# when {ends} script is stopped, it stops the others. Written by `anychip launch`.
# The same without this script: pdsh -w HOSTS "bash $PWD/node.sh %n GENERATION"
set -uo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
generation=${{1:-$(date +%s)-$$}}
hosts=(
{hosts}
)
{token}started=()
stop() {{
    trap - EXIT INT TERM
    kill "${{started[@]}}" 2>/dev/null
    wait
}}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for node in "${{!hosts[@]}}"; do
    case ${{hosts[$node]}} in
        127.* | ::1 | localhost) bash "$here/node.sh" "$node" "$generation" & ;;
        # -tt: when the connection ends, so do the processes at its other end
        *) ssh -tt -o BatchMode=yes "${{hosts[$node]}}" "bash '$here/node.sh' $node $generation" </dev/null & ;;
    esac
    started+=("$!")
done
{_WAIT_FOR_ALL if job.least_hosts else _WAIT_FOR_FIRST}"""


_WAIT_FOR_FIRST = """for _ in "${started[@]}"; do
    wait -n || exit
done
"""
_WAIT_FOR_ALL = """code=0
for one in "${started[@]}"; do
    wait "$one" || code=$?
done
exit "$code"
"""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
