"""Starting a job on a cluster."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RecipeArgument, SetOption


def launch(
    recipe: RecipeArgument,
    cluster: Annotated[Path, typer.Option(help="A cluster file, such as clusters/this-cpu.yaml.")],
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: launch/NAME.")] = None,
    supervise: Annotated[
        int, typer.Option(min=0, help="torchrun, slurm: recover by itself, and go on with as few hosts; 0: do not.")
    ] = 0,
    submit: Annotated[bool, typer.Option("--submit", help="Also start it, where the client is installed.")] = False,
) -> None:
    """Write what starts a recipe on a cluster: scripts for torchrun or Slurm, manifests for Kubernetes."""
    from anychip.launch.submit import submit as start
    from anychip.launch.write import write

    written = write(recipe, cluster, overrides or [], out, supervise)
    for path in written.files:
        typer.echo(f"wrote {path}")
    if submit:
        start(written)
    else:
        typer.echo(f"start it: {shlex.join(written.command)}")
