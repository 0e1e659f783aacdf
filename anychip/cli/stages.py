"""Running a recipe, whole or stage by stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RUNS, RecipeArgument, RunsOption, SetOption


def run(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Run every stage of a recipe in order; continue where it stopped."""
    from anychip.stages import open_run, run_stages

    run_stages(*open_run(recipe, overrides or [], runs))


def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build and step one rank without memory or data.")] = False,
    world_size: Annotated[int | None, typer.Option(help="Dry run: processes of the job.")] = None,
    rank: Annotated[int, typer.Option(help="Dry run: which of them.")] = 0,
    model_stage: Annotated[
        int | None, typer.Option(help="Dry run, of a recipe that grows: only the model after so many growths.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Dry run: print JSON for programs.")] = False,
) -> None:
    """Pretrain on packed data, or continue from the newest checkpoint."""
    from anychip.stages import open_run, run_stage

    if dry_run:
        _dry_run(recipe, overrides or [], world_size, rank, model_stage, as_json)
        return
    if "ANYCHIP_CHAOS" in os.environ:  # a rehearsal of faults (anychip chaos)
        from anychip.supervise.chaos.inside import take_part

        take_part()
    run_stage("train", *open_run(recipe, overrides or [], runs))


def sft(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Tune the pretrained model on questions and answers."""
    from anychip.stages import open_run, run_stage

    run_stage("sft", *open_run(recipe, overrides or [], runs))


def dpo(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Tune on pairs of answers, the one preferred to the other."""
    from anychip.stages import open_run, run_stage

    run_stage("dpo", *open_run(recipe, overrides or [], runs))


def grpo(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Tune by rewards on the model's own answers to questions that can be checked."""
    from anychip.stages import open_run, run_stage

    run_stage("grpo", *open_run(recipe, overrides or [], runs))


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RECIPE|MODEL|URL", help="With --task: a run, export or server.")],
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    task: Annotated[list[Path] | None, typer.Option(help="A task file in lm-eval's form; may be repeated.")] = None,
    harness: Annotated[bool, typer.Option(help="Run the task files by lm-eval.")] = False,
    chat: Annotated[bool, typer.Option(help="Ask in the model's chat template.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
) -> None:
    """Measure held-out bits per byte of a recipe's run, or run task files over a model."""
    if not task:
        from anychip.stages import open_run, run_stage

        run_stage("eval", *open_run(Path(target), overrides or [], runs))
        return
    from anychip.serve.evaluate import described, evaluate_tasks, keep_results, open_model

    records = evaluate_tasks(open_model(target, chat=chat), task, harness=harness, limit=limit)
    for record in records:
        typer.echo(described(record))
    if output is not None:
        keep_results(output, records)


def report(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Write report.html: curves, throughput, samples."""
    from anychip.stages import open_run, run_stage

    run_stage("report", *open_run(recipe, overrides or [], runs))


def _dry_run(
    recipe: Path, overrides: list[str], world_size: int | None, rank: int, model_stage: int | None, as_json: bool
) -> None:
    import json

    from anychip.errors import InputError
    from anychip.recipe import load_recipe
    from anychip.train.dry_runs import dry_runs

    if world_size is None:
        raise InputError("a dry run must know the size of the job.", do="Give --world-size, and --rank.")
    found = dry_runs(load_recipe(recipe, overrides), world_size, rank, model_stage)
    if as_json:
        values = [one.as_json() for one in found]
        typer.echo(json.dumps(values[0] if len(values) == 1 else {"models": values}, indent=2))
        return
    for number, one in enumerate(found):
        heading = f"model {number} (of 0 to {len(found) - 1})\n\n" if len(found) > 1 else ""
        typer.echo(heading + one.as_text() + ("\n" if number + 1 < len(found) else ""))
