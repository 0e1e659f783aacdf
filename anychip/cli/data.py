"""Preparing a corpus and looking into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RUNS, RecipeArgument, RunArgument, RunsOption, SetOption, one_of


def prepare(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Read, clean, deduplicate, tokenize and pack the corpus."""
    from anychip.stages import open_run, run_stage

    run_stage("data", *open_run(recipe, overrides or [], runs))


def inspect(
    source: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A run directory, or the recipe of one.")],
    stage: Annotated[str, typer.Option(help="train, sft or dpo.")] = "train",
    step: Annotated[int, typer.Option(help="Step of that stage, counted from 0.", min=0)] = 0,
    sample: Annotated[int | None, typer.Option(help="sft, dpo: one row of the step; default: all.")] = None,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Show the samples of a step as text, with where they come from; of tuning also what is learned."""
    from anychip.rundir import RunDirectory
    from anychip.stages import open_run

    if source.is_dir():
        run = RunDirectory(source)
        recipe = run.read_recipe()
    else:
        recipe, run = open_run(source, overrides or [], runs)
    if one_of(stage, "stage", ("train", "sft", "dpo")) == "train":
        from anychip.data.prepare import inspect_data

        typer.echo(inspect_data(run, step))
        return
    from rich.console import Console

    from anychip.tune.inspect import show_sample

    show_sample(recipe, run, stage, step, sample, Console(soft_wrap=True))


def ledger(
    run_directory: RunArgument,
    step: Annotated[int | None, typer.Option(help="Which documents fed this step (from 0)?")] = None,
    document: Annotated[str | None, typer.Option(help="Which steps saw this document?")] = None,
) -> None:
    """Say which documents fed a step, or which steps saw a document."""
    from anychip.data.ledger import describe_document, describe_step
    from anychip.errors import InputError
    from anychip.rundir import RunDirectory

    run = RunDirectory(run_directory)
    if (step is None) == (document is None):
        raise InputError("the ledger answers one question at a time.", do="Give either --step or --document.")
    typer.echo(describe_document(run, document) if document is not None else describe_step(run, step or 0))
