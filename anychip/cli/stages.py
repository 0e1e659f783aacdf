"""Running a recipe, whole or stage by stage."""

from __future__ import annotations

from anychip.cli.options import RUNS, RecipeArgument, RunsOption, SetOption


def run(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Run every stage of a recipe in order; continue where it stopped."""
    from anychip.stages import open_run, run_stages

    run_stages(*open_run(recipe, overrides or [], runs))


def train(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Pretrain on packed data, or continue from the newest checkpoint."""
    from anychip.stages import open_run, run_stage

    run_stage("train", *open_run(recipe, overrides or [], runs))


def sft(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Tune the pretrained model on questions and answers."""
    from anychip.stages import open_run, run_stage

    run_stage("sft", *open_run(recipe, overrides or [], runs))


def evaluate(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Measure held-out bits per byte, beside xz -9 and a 5-gram model."""
    from anychip.stages import open_run, run_stage

    run_stage("eval", *open_run(recipe, overrides or [], runs))


def report(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Write report.html: curves, throughput, samples."""
    from anychip.stages import open_run, run_stage

    run_stage("report", *open_run(recipe, overrides or [], runs))
