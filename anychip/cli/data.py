"""Preparing a corpus and looking into it."""

from __future__ import annotations

from typing import Annotated

import typer

from anychip.cli.options import RUNS, RecipeArgument, RunArgument, RunsOption, SetOption


def prepare(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Read, clean, deduplicate, tokenize and pack the corpus."""
    from anychip.stages import open_run, run_stage

    run_stage("data", *open_run(recipe, overrides or [], runs))


def inspect(
    run_directory: RunArgument, step: Annotated[int, typer.Option(help="Training step, counted from 0.")] = 0
) -> None:
    """Show the samples of a step as text, with the documents they come from."""
    from anychip.data.prepare import inspect_data
    from anychip.rundir import RunDirectory

    typer.echo(inspect_data(RunDirectory(run_directory), step))


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
