"""The command line: one short function a verb. What a verb does lives in the room of its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from anychip.errors import AnychipError

app = typer.Typer(
    name="anychip",
    help="Plan, train, grow, tune, prove and serve large language models on any chip.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare a corpus, look into it, ask which documents fed a step.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/demo.yaml.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/demo.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override any field of the recipe.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that holds the run directories.")]
RUNS = Path("runs")


@app.command()
def run(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Run every stage of a recipe in order; continue where it stopped."""
    from anychip.stages import open_run, run_stages

    run_stages(*open_run(recipe, overrides or [], runs))


@app.command()
def train(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Pretrain on packed data, or continue from the newest checkpoint."""
    from anychip.stages import open_run, run_stage

    run_stage("train", *open_run(recipe, overrides or [], runs))


@app.command()
def sft(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Tune the pretrained model on questions and answers."""
    from anychip.stages import open_run, run_stage

    run_stage("sft", *open_run(recipe, overrides or [], runs))


@app.command("eval")
def evaluate(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Measure held-out bits per byte, beside xz -9 and a 5-gram model."""
    from anychip.stages import open_run, run_stage

    run_stage("eval", *open_run(recipe, overrides or [], runs))


@app.command()
def report(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Write report.html: curves, throughput, samples."""
    from anychip.stages import open_run, run_stage

    run_stage("report", *open_run(recipe, overrides or [], runs))


@app.command()
def init(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Write a randomly initialised checkpoint of a recipe's model, without training."""
    from anychip.interchange.initialize import init_model
    from anychip.stages import open_run

    typer.echo(f"wrote {init_model(*open_run(recipe, overrides or [], runs))}")


@app.command()
def export(
    run_directory: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Where to write; default RUN/export.")] = None,
    stage: Annotated[str | None, typer.Option(help="pretrain or sft; default: the newest that exists.")] = None,
    step: Annotated[int | None, typer.Option(help="Which checkpoint; default: the newest.")] = None,
) -> None:
    """Write a checkpoint in the published Hugging Face layout, and check its logits."""
    from anychip.interchange.export import export_run
    from anychip.rundir import RunDirectory

    typer.echo(f"wrote {export_run(RunDirectory(run_directory), step=step, stage=stage, out=out)}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help="A published model directory.")],
    run_directory: RunArgument,
) -> None:
    """Read a published TeleChat2 directory (safetensors or old .bin) into a new run directory."""
    from anychip.interchange.import_model import import_model
    from anychip.rundir import RunDirectory

    import_model(source, RunDirectory(run_directory))
    typer.echo(f"wrote {run_directory}")


@data_app.command("prepare")
def data_prepare(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Read, clean, deduplicate, tokenize and pack the corpus."""
    from anychip.stages import open_run, run_stage

    run_stage("data", *open_run(recipe, overrides or [], runs))


def main() -> None:
    """Run the command; a user's mistake ends with one paragraph and exit code 2, never with a traceback."""
    try:
        app(standalone_mode=True)
    except AnychipError as error:
        print(f"anychip: {error.paragraph}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
