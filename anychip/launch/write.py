"""`anychip launch`: read recipe and cluster, refuse what cannot run, write what starts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from anychip.errors import InputError
from anychip.files import write_text
from anychip.launch import kubernetes, slurm, torchrun
from anychip.launch.job import Job, job_of
from anychip.recipe import dump_recipe, load_recipe
from anychip.recipe.cluster import load_cluster

MANIFESTS: dict[str, Callable[[Job], str]] = {
    "kubernetes": kubernetes.pytorchjob,
    "volcano": kubernetes.volcanojob,
    "ascendjob": kubernetes.ascendjob,
}


@dataclass(frozen=True)
class Written:
    """What was written, and the command that starts it."""

    job: Job
    folder: Path
    files: tuple[Path, ...]
    command: tuple[str, ...]


def write(
    recipe: Path, cluster: Path, overrides: Sequence[str] = (), out: Path | None = None, least_hosts: int = 0
) -> Written:
    """Write the job's files to `out`, by default launch/NAME. With `least_hosts`, `anychip supervise` runs the job and
    goes on with as few. Raises InputError for what cannot be started."""
    job = job_of(load_recipe(recipe, overrides), load_cluster(cluster), least_hosts)
    folder = (out or Path("launch") / job.recipe.name).resolve()
    texts, command = _texts(job, folder)
    texts = {torchrun.RECIPE: dump_recipe(job.recipe), **texts}
    for name, text in texts.items():
        write_text(folder / name, text)
        if name.endswith(".sh"):
            (folder / name).chmod(0o755)
    return Written(job, folder, tuple(folder / name for name in texts), command)


def _texts(job: Job, folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """The files beside the recipe, all checked before the first is written, and the command that starts them."""
    kind = job.launch.kind
    if kind == "torchrun":
        return torchrun.scripts(job), ("bash", str(folder / "start.sh"))
    if kind == "slurm":
        return {"job.sbatch": slurm.script(job, folder / torchrun.RECIPE)}, ("sbatch", str(folder / "job.sbatch"))
    try:
        return {"job.yaml": MANIFESTS[kind](job)}, ("kubectl", "apply", "-f", str(folder / "job.yaml"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"Kubernetes would refuse {first['input']!r} ({'.'.join(map(str, first['loc']))}: {first['msg']}).",
            where=f"launch ({kind})",
            do="Correct the field of the cluster file that ends up there.",
        ) from None
