"""Growth by hand, and what it will take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RUNS, JsonOption, RecipeArgument, RunsOption, SetOption


def grow(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    number: Annotated[int, typer.Option("--growth", help="Which of the recipe's growths, from 0.")] = 0,
    source: Annotated[
        Path | None, typer.Option(help="A checkpoints folder to grow the newest of; default: the run's own.")
    ] = None,
    target: Annotated[Path | None, typer.Option(help="With --source: the folder for the grown checkpoint.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of this host that share the work.")] = 1,
    proof: Annotated[bool, typer.Option(help="Compare logits before it is published.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print time, disk and memory of all growths.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Grow a checkpoint as the recipe says: shard by shard, in constant memory, from where it stopped."""
    from anychip.stages import dry_run_growth, grow_by_hand

    if dry_run:
        typer.echo(dry_run_growth(recipe, overrides or [], runs, processes, as_json=as_json))
        return
    if found := grow_by_hand(recipe, overrides or [], runs, number, source, target, processes, prove_it=proof):
        typer.echo(found)
