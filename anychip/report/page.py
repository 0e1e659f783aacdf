"""One HTML file about one run: everything inline, nothing loaded from a network, every foreign text escaped."""

from __future__ import annotations

from pathlib import Path

from anychip.errors import InputError
from anychip.files import write_text
from anychip.report import figures, rewards, words
from anychip.report.growth import growth
from anychip.report.inputs import Inputs, read_inputs
from anychip.report.templates import render_template
from anychip.rundir import RunDirectory


def write_report(run: RunDirectory) -> Path:
    """Write `report.html` of a run from whatever the run has so far; returns its path.

    A missing input leaves its section out with a line that says so. Raises InputError when there is no such directory.
    """
    if not run.root.is_dir():
        raise InputError("is not a run directory.", where=run.root, do="Give runs/NAME of a run that was started.")
    write_text(run.report, render(read_inputs(run)))
    return run.report


def render(inputs: Inputs) -> str:
    """The page as text."""
    return render_template(
        "page.html",
        name=inputs.recipe.name if inputs.recipe else inputs.run.root.resolve().name,
        summary=words.summary(inputs),
        tiles=words.tiles(inputs),
        answers=words.answers(inputs),
        sampling=words.sampling(inputs),
        score=figures.score(inputs),
        learning=figures.learning(inputs),
        growths=growth(inputs),
        speed=figures.speed(inputs),
        stages=words.stages(inputs),
        tuning=figures.tuning(inputs),
        rewards=rewards.rewards(inputs),
        tasks=rewards.tasks(inputs),
        data=figures.data(inputs),
        model=words.model(inputs),
        recipe_text=inputs.recipe_text,
    )
