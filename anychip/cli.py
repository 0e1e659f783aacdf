"""The command line: one short function a verb. What a verb does lives in the room of its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

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
bench_app = typer.Typer(help="Measure what is here.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

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
WeightsOption = Annotated[str, typer.Option(help="auto (as stored), bf16 or fp32.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
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
    from anychip.stages import keep_recipe, open_run

    opened = open_run(recipe, overrides or [], runs)
    written = init_model(*opened)
    keep_recipe(*opened)
    typer.echo(f"wrote {written}")


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


@data_app.command("prepare")
def data_prepare(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Read, clean, deduplicate, tokenize and pack the corpus."""
    from anychip.stages import open_run, run_stage

    run_stage("data", *open_run(recipe, overrides or [], runs))


@data_app.command("inspect")
def data_inspect(
    run_directory: RunArgument, step: Annotated[int, typer.Option(help="Training step, counted from 0.")] = 0
) -> None:
    """Show the samples of a step as text, with the documents they come from."""
    from anychip.data.prepare import inspect_data
    from anychip.rundir import RunDirectory

    typer.echo(inspect_data(RunDirectory(run_directory), step))


@data_app.command("ledger")
def data_ledger(
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


@app.command()
def chat(
    model: ModelArgument,
    system: SystemOption = "",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    max_new_tokens: LengthOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    weights: WeightsOption = "auto",
) -> None:
    """Talk to a model in the terminal; from a pipe, each line is a question."""
    from anychip.serve.chat import chat

    sampling = _given(temperature, top_k, top_p, repetition_penalty, max_new_tokens)
    chat(model, system=system, sampling=sampling, seed=seed, weights=_one_of(weights, "weights", WEIGHTS))


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="A .jsonl of prompts or messages, or a text file.")] = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="The prompt is a question to answer.")] = False,
    system: SystemOption = "",
    samples: Annotated[int, typer.Option(help="Results a prompt.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    format: Annotated[str, typer.Option(help="text or jsonl.")] = "text",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    max_new_tokens: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Same seed, same results.")] = 0,
    weights: WeightsOption = "auto",
) -> None:
    """Continue prompts, or answer questions, for scripts."""
    from anychip.serve.generate import generate

    generate(
        model,
        prompt=prompt,
        file=file,
        chat=as_chat,
        system=system,
        samples=samples,
        output=output,
        format=_one_of(format, "format", ("text", "jsonl")),
        sampling=_given(temperature, top_k, top_p, repetition_penalty, max_new_tokens),
        seed=seed,
        weights=_one_of(weights, "weights", WEIGHTS),
    )


@app.command()
def chips(as_json: JsonOption = False) -> None:
    """List the chips that are known, with their figures, and what is detected here."""
    import json

    from anychip.chips.listing import chips_as_json, chips_as_text

    typer.echo(json.dumps(chips_as_json(), indent=2, ensure_ascii=False) if as_json else chips_as_text())


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check that torch, plug-in, driver and devices here fit together; exit code 3 when they do not."""
    import json

    from anychip.chips.doctor import examine
    from anychip.errors import EXIT_UNFIT

    report = examine()
    typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False) if as_json else report.as_text())
    if not report.fit:
        raise typer.Exit(EXIT_UNFIT)


@bench_app.command("chip")
def bench_chip(
    out: Annotated[Path | None, typer.Option(help="File for the JSON; default: standard output.")] = None,
) -> None:
    """Measure products, attention, memory and collectives of the chip at hand, as JSON for planning."""
    import json

    from anychip.chips.bench import describe, measure_chip
    from anychip.files import write_json

    measured = measure_chip()
    if out is not None:
        write_json(out, measured)
    typer.echo(json.dumps(measured, indent=2) if out is None else f"{describe(measured)}\nwrote {out}")


WEIGHTS = ("auto", "bf16", "fp32")


def _given(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """The sampling fields that were given on the command line."""
    values = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
    }
    return {name: value for name, value in values.items() if value is not None}


def _one_of(value: str, option: str, allowed: tuple[str, ...]) -> Any:
    from anychip.errors import InputError

    if value not in allowed:
        raise InputError(f"--{option} is {value!r}.", do=f"Allowed: {', '.join(allowed)}.")
    return value


def main() -> None:
    """Run the command; a user's mistake ends with one paragraph and exit code 2, never with a traceback."""
    from anychip.chips.environment import set_thread_environment

    set_thread_environment()
    try:
        app(standalone_mode=True)
    except AnychipError as error:
        print(f"anychip: {error.paragraph}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except RuntimeError as error:  # `import torch` loads plug-ins, and a broken one breaks it
        if "Failed to load the backend extension" not in str(error):
            raise
        from anychip.errors import EXIT_UNFIT

        print(f"anychip: {error} `anychip doctor` says what is missing.", file=sys.stderr)
        sys.exit(EXIT_UNFIT)
    except OSError as error:  # a full or failing disk, a missing permission
        place = f"{error.filename}: " if error.filename else ""
        print(f"anychip: {place}{error.strerror or error}. What was finished before is intact.", file=sys.stderr)
        sys.exit(1)
