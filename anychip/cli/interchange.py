"""Weights in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RUNS, RecipeArgument, RunArgument, RunsOption, SetOption


def init(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Write a randomly initialised checkpoint of a recipe's model, without training."""
    from anychip.interchange.initialize import init_model
    from anychip.stages import keep_recipe, open_run

    opened = open_run(recipe, overrides or [], runs)
    written = init_model(*opened)
    keep_recipe(*opened)
    typer.echo(f"wrote {written}")


def export(
    run_directory: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Where to write; default RUN/export.")] = None,
    stage: Annotated[str | None, typer.Option(help="pretrain, sft, dpo, grpo; default: the newest.")] = None,
    step: Annotated[int | None, typer.Option(help="Which checkpoint; default: the newest.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the LoRA adapter alone, as PEFT reads it.")] = False,
) -> None:
    """Write a checkpoint in the published Hugging Face layout, and check its logits."""
    from anychip.interchange.export import export_run
    from anychip.rundir import RunDirectory

    if adapter:
        from anychip.interchange.adapter import export_adapter

        typer.echo(f"wrote {export_adapter(RunDirectory(run_directory), stage, out)}")
        return
    typer.echo(f"wrote {export_run(RunDirectory(run_directory), step=step, stage=stage, out=out)}")


def import_(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help="A published model directory.")],
    recipe: RecipeArgument,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Start a recipe from published TeleChat2 weights (safetensors or old .bin)."""
    from anychip.interchange.import_model import import_model
    from anychip.stages import keep_recipe, open_run

    opened = open_run(recipe, overrides or [], runs)
    written = import_model(source, *opened)
    keep_recipe(*opened)
    typer.echo(f"wrote {written}")


def merge(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Exported or published model directories.")],
    out: Annotated[Path, typer.Option(help="Where to write; must not exist.")],
    weight: Annotated[list[float] | None, typer.Option(help="One for each model, in order; default: equal.")] = None,
) -> None:
    """Average the weights of models of one shape."""
    from anychip.interchange.merge import merge_models

    typer.echo(f"wrote {merge_models(models, weight, out)}")
