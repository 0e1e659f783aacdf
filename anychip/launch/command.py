"""The torchrun line that starts the processes of one node."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from anychip.chips.facts import Setting, collective_timeouts
from anychip.launch.job import Job

TRAIN = ("-m", "anychip", "train")


def torchrun_line(
    job: Job, *, node: str, processes: str, endpoint: str, generation: str, recipe: str, bind: str | None = None
) -> str:
    """Shell text. `node`, `processes`, `endpoint`, `generation`, `recipe` and `bind` are shell words already, such as
    "$node"; `bind` is the address that node 0 listens on, where neither endpoint nor interface tells it.

    No restarts by torchrun: its second attempt would read keys of the first one in the same store, and one node's count
    of attempts is not another's. Whoever started the job starts it again, under a new id; training continues from its
    newest checkpoint.
    """
    conf = [f"rank={node}", f"timeout={collective_timeouts(job.world_size).group}"]
    if job.launch.network_interface is not None:
        conf.append(f"interface={job.launch.network_interface}")
    elif bind is not None:
        conf.append(f"bind={bind}")
    words = [
        f"{shlex.quote(job.python)} -m torch.distributed.run",
        f"--nnodes={job.nodes} --nproc-per-node={processes}",
        f"--rdzv-backend=anychip --rdzv-endpoint={endpoint} --rdzv-id={shlex.quote(job.name)}-{generation}",
        f"--rdzv-conf={','.join(conf)} --max-restarts=0",
        f"{shlex.join(TRAIN)} {recipe}",
    ]
    return " \\\n    ".join(words)


def supervise_line(job: Job, *, node: str, processes: str, coordinator: str, recipe: str, token: str, bind: str) -> str:
    """The same under `anychip supervise`, which recovers. Shell words as above; `bind` is "" where the interface or the
    way to the coordinator tells the address."""
    own = f" --interface {job.launch.network_interface}" if job.launch.network_interface is not None else bind
    words = [
        f"{shlex.quote(job.python)} -m anychip supervise {recipe}",
        f"--nodes {job.least_hosts}:{job.nodes} --processes {processes}",
        f"--coordinator {coordinator} --token-file {token} --node-name {node}{own}",
    ]
    return " \\\n    ".join(words)


def make_token(path: str) -> str:
    """A shell line that makes a file with a secret unless it is there."""
    return f"[ -s {path} ] || (umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n' >{path})"


def exports(settings: Sequence[Setting]) -> str:
    """Shell lines that set each variable unless it is set already, with the reason."""
    return "\n".join(
        f'[ -n "${{{setting.name}+set}}" ] || export {setting.name}={shlex.quote(setting.value)}  # {setting.why}'
        for setting in settings
    )
