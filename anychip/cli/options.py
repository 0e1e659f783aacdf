"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/demo.yaml.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/demo.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override any field of the recipe.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that holds the run directories.")]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A run directory or an exported model.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 takes the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(help="Sample among this many tokens; 0: all.")]
TopPOption = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total probability.")]
PenaltyOption = Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")]
LengthOption = Annotated[int | None, typer.Option(help="Longest answer in tokens.")]
SystemOption = Annotated[str, typer.Option(help="System message.")]
WeightsOption = Annotated[str, typer.Option(help="auto (as stored), bf16, fp32 or int8.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RUNS = Path("runs")


def one_of(value: str, option: str, allowed: tuple[str, ...]) -> Any:
    from anychip.errors import InputError

    if value not in allowed:
        raise InputError(f"--{option} is {value!r}.", do=f"Allowed: {', '.join(allowed)}.")
    return value
