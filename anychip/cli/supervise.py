"""Keeping a run alive, and saying what happened to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RUNS, RecipeArgument, RunArgument, RunsOption, SetOption


def supervise(
    recipe: RecipeArgument,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this host, one a chip.")] = 1,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    restarts: Annotated[int, typer.Option(min=0, help="Starts without progress between them before giving up.")] = 20,
    min_processes: Annotated[int, typer.Option(min=0, help="Go on with as few when a chip keeps failing.")] = 0,
) -> None:
    """Train in several processes of this host, and start again after what can be survived."""
    from anychip.stages import open_run
    from anychip.supervise.one_host import supervise
    from anychip.supervise.run import Limits

    loaded, run = open_run(recipe, overrides or [], runs)
    words = [word for setting in overrides or [] for word in ("--set", setting)]
    arguments = [str(recipe), "--runs", str(runs), *words]
    supervise(loaded, run, arguments, processes, Limits(restarts), min_processes)


def explain(run_directory: RunArgument) -> None:
    """Say in sentences how far a run came, what went wrong, and what to do."""
    from anychip.rundir import RunDirectory
    from anychip.supervise.explain import explain

    typer.echo(explain(RunDirectory(run_directory)))


def chaos(
    recipe: RecipeArgument,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this host.")] = 2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same faults.")] = 0,
    faults: Annotated[int, typer.Option(min=1, help="How many; fewer strike when training ends first.")] = 30,
    overrides: SetOption = None,
    runs: RunsOption = Path("runs/chaos"),
) -> None:
    """Train under faults on purpose, and compare with a run that had none."""
    from anychip.errors import EXIT_UNFIT
    from anychip.recipe import load_recipe
    from anychip.supervise.chaos import chaos

    words = [word for setting in overrides or [] for word in ("--set", setting)]
    loaded = load_recipe(recipe, overrides or [])
    result = chaos(loaded, recipe, words, runs / f"seed-{seed}", processes, seed, faults)
    typer.echo(result.describe())
    if result.broken:
        raise typer.Exit(EXIT_UNFIT)
