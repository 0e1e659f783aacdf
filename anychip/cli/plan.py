"""Planning: which layout, how fast, how much memory, how many days."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anychip.cli.options import RUNS, JsonOption, RecipeArgument, RunsOption, SetOption, one_of

if TYPE_CHECKING:
    from anychip.plan.question import Question
    from anychip.plan.types import Site

ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", help="A cluster file, such as clusters/ascend-910b-8192.yaml.")
]
ChipOption = Annotated[str | None, typer.Option(help="Another chip of the catalogue (`anychip chips` lists them).")]
DevicesOption = Annotated[int | None, typer.Option(help="Another number of devices.")]
SeqLengthOption = Annotated[int | None, typer.Option(help="Another sequence length, with the same tokens a step.")]
SiteOption = Annotated[str | None, typer.Option(help="A site's name or file; default: the shipped one of the chip.")]
BenchOption = Annotated[
    Path | None, typer.Option(help="JSON of `anychip bench chip`: plan for the machine it was measured on.")
]
ModelStageOption = Annotated[
    int | None,
    typer.Option(help="Of a recipe that grows only the model after so many growths; 0: the one it starts with."),
]
ImbalanceOption = Annotated[
    float | None,
    typer.Option("--expert-imbalance", help="Load of the busiest rank of experts over the mean, such as 1.3."),
]
SoftwareOption = Annotated[
    str,
    typer.Option(help="Whose memory is counted: anychip, or megatron, mindspeed, mindformers, fsdp, deepspeed, jax."),
]
RunsCsvOption = Annotated[list[Path], typer.Option("--runs", help="A CSV of measured runs; may be given again.")]


def layouts(
    recipe: RecipeArgument,
    cluster: ClusterOption = None,
    overrides: SetOption = None,
    chip: ChipOption = None,
    devices: DevicesOption = None,
    seq_length: SeqLengthOption = None,
    site: SiteOption = None,
    software: SoftwareOption = "anychip",
    tokens: Annotated[str | None, typer.Option(help="Tokens of the whole job: 10T, 300B or 1e13.")] = None,
    model_stage: ModelStageOption = None,
    expert_imbalance: ImbalanceOption = None,
    fixed: Annotated[bool, typer.Option("--fixed", help="The recipe's own layout instead of a search.")] = False,
    bench: BenchOption = None,
    html: Annotated[
        Path | None, typer.Option(help="File for a page with pictures; folders that are missing are made.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the plan with the run: the log will show it.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """The ten best layouts of a recipe: time, memory, days. This is what `anychip plan RECIPE` does."""
    import json

    from anychip.errors import InputError
    from anychip.plan.models import tokens_of
    from anychip.plan.question import HERE, ask, with_imbalance
    from anychip.plan.recipe_plan import as_json as plan_json
    from anychip.plan.recipe_plan import as_text, exit_code, plan_recipe
    from anychip.plan.saved import save_plan
    from anychip.report.plan_page import write_plan_page
    from anychip.rundir import RunDirectory

    question = ask(
        recipe, overrides or [], cluster=cluster, chip=chip, devices=devices, seq_length=seq_length, site=site,
        bench=bench, model_stage=model_stage, tokens=None if tokens is None else tokens_of(tokens), software=software,
    )  # fmt: skip
    _doubt((constants, machine.chip) for constants, machine in zip(question.sites, question.machines, strict=True))
    question = with_imbalance(question, expert_imbalance)
    if save and software != HERE:
        raise InputError("--save keeps a plan of our own training.", do="Leave --software out.")
    if html is not None and len(question.models) > 1:
        raise InputError("--html shows one model, and this recipe grows.", do="Say which with --model-stage.")
    if len(question.machines) > 1:
        if fixed or save:
            raise InputError(
                "--fixed and --save are for one kind of chips.",
                where=question.name,
                do="Take --json, which has time and memory of every stage, or plan one kind with --chip and --devices.",
            )
        _mixed(question, html, as_json)
        return
    plans = plan_recipe(question, fixed=fixed)
    if save:
        save_plan(plans, RunDirectory(runs / question.recipe.name).plan)
    if html is not None:
        write_plan_page(plans[0].answered, html)
    typer.echo(json.dumps(plan_json(plans), indent=2) if as_json else as_text(plans))
    if code := exit_code(plans):
        raise typer.Exit(code)


def explain(
    recipe: RecipeArgument,
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help='Such as "tp8 pp8 vpp3 mbs1 zero1 interleaved".')],
    cluster: ClusterOption = None,
    overrides: SetOption = None,
    chip: ChipOption = None,
    devices: DevicesOption = None,
    seq_length: SeqLengthOption = None,
    site: SiteOption = None,
    software: SoftwareOption = "anychip",
    bench: BenchOption = None,
    model_stage: ModelStageOption = None,
    expert_imbalance: ImbalanceOption = None,
    as_json: JsonOption = False,
) -> None:
    """One layout of a recipe: where its time goes, what fills its memory, why it does not fit."""
    import json

    from anychip.errors import InputError
    from anychip.plan.answer import answer_plan, explained_json
    from anychip.plan.layouts import parse_layout
    from anychip.plan.question import ask, with_imbalance
    from anychip.plan.text import explained_as_text

    question = ask(
        recipe, overrides or [], cluster=cluster, chip=chip, devices=devices, seq_length=seq_length, site=site,
        bench=bench, model_stage=model_stage, software=software,
    )  # fmt: skip
    _doubt((constants, machine.chip) for constants, machine in zip(question.sites, question.machines, strict=True))
    question = with_imbalance(question, expert_imbalance)
    if len(question.machines) > 1:
        raise InputError(
            "a layout is explained on one kind of chips.",
            where=question.name,
            do="Leave out --cluster and name one with --chip and --devices; `plan` explains the best mixed one.",
        )
    (machine,), (constants,) = question.machines, question.sites
    answers = []
    for model in question.models:
        asked = parse_layout(
            layout, model.workload, machine.devices, trained_here=constants.trained_here,
            context_method=model.recipe.parallel.context_method,
        )  # fmt: skip
        answers.append(answer_plan(model.workload, machine, constants, model.tokens, asked, question.failures))
    if as_json:
        found = [explained_json(answer) for answer in answers]
        typer.echo(json.dumps(found[0] if len(found) == 1 else {"models": found}, indent=2))
        return
    texts = [explained_as_text(answer) for answer in answers]
    titled = [f"{model.title}\n{text}" for model, text in zip(question.models, texts, strict=True)]
    typer.echo("\n\n".join(titled if len(titled) > 1 else texts))


def validate(
    runs: RunsCsvOption,
    site: SiteOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for every row's prediction; missing folders are made.")
    ] = None,
) -> None:
    """How far the planner is from measured runs, beside the one-line baseline."""
    from anychip.files import write_json
    from anychip.plan.sites import load_site
    from anychip.plan.text import validation_as_text
    from anychip.plan.validate import validate as validate_runs

    given = load_site(site) if site else None
    report = validate_runs(runs, given)
    if given is not None:
        _doubt([(given, row.run.chip) for row in report.rows])
    if json_file is not None:
        write_json(json_file, report.as_json())
    typer.echo(validation_as_text(report))


def calibrate(
    runs: RunsCsvOption,
    out: Annotated[Path, typer.Option(help="Site file to write.")],
    start: Annotated[str | None, typer.Option(help="Site to start from; default: the shipped one of the runs.")] = None,
    bench: Annotated[
        Path | None,
        typer.Option(help="JSON of `anychip bench chip`: products and attention come from it, the rest is fitted."),
    ] = None,
) -> None:
    """Fit a site's few scalars to measured runs; print its error on runs that it was not fitted to."""
    from anychip.plan.calibrate import calibrate as fit
    from anychip.plan.local import read_bench
    from anychip.plan.measured_products import with_measured_products
    from anychip.plan.rows import read_files
    from anychip.plan.sites import load_site, write_site
    from anychip.plan.text import calibration_as_text
    from anychip.plan.validate import default_site_of

    found, skipped = read_files(runs)
    begin = load_site(start) if start else default_site_of(found[0])
    measured: tuple[str, ...] = ()
    if bench is not None:
        begin, measured = with_measured_products(begin, read_bench(bench), found)
    calibration = fit(found, begin, out.stem, skipped, measured)
    write_site(calibration.site, out)
    typer.echo(f"{calibration_as_text(calibration, begin)}\nwrote {out}")


def _doubt(used: Iterable[tuple[Site, str]]) -> None:
    """Say on stderr, once each, where a site is used for chips of another family."""
    from anychip.plan.sites import foreign_site

    for words in dict.fromkeys(foreign_site(site, chip) for site, chip in used):
        if words is not None:
            typer.echo(f"note: {words}", err=True)


def _mixed(question: Question, html: Path | None, as_json: bool) -> None:
    """A cluster of several kinds of chips: which stages go where."""
    import json

    from anychip.plan.mixed_answer import answer_mixed, mixed_json
    from anychip.plan.mixed_text import mixed_as_text
    from anychip.report.mixed_page import write_mixed_page

    answers = [answer_mixed(question, model) for model in question.models]
    if html is not None:
        write_mixed_page(answers[0], html)
    if as_json:
        found = [mixed_json(answer) for answer in answers]
        typer.echo(json.dumps(found[0] if len(found) == 1 else {"models": found}, indent=2))
        return
    pairs = zip(question.models, answers, strict=True)
    typer.echo("\n\n\n".join(mixed_as_text(answer, model.title if model.of > 1 else "") for model, answer in pairs))


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A script, YAML, TOML or config.json of others.")],
    out: Annotated[Path, typer.Option(help="Recipe to write.")],
    format: Annotated[
        str | None, typer.Option(help="megatron, mindformers, torchtitan or huggingface; default: by the file's name.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Processes of the run, where the source does not say how many.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the recipe that is there.")] = False,
) -> None:
    """Write a recipe from a Megatron or MindSpeed script, a MindFormers or torchtitan file, or a config.json."""
    import yaml

    from anychip.errors import InputError
    from anychip.files import write_text
    from anychip.plan.importers import import_recipe
    from anychip.plan.importers.read import KINDS

    kind = one_of(format, "format", KINDS) if format is not None else None
    if out.exists() and not force:
        raise InputError("is there already and is not overwritten.", where=out, do="Give another --out, or --force.")
    found = import_recipe(source, kind, devices)
    write_text(out, yaml.safe_dump(found.recipe, sort_keys=False))
    typer.echo("\n".join([f"wrote {out}", *(f"note: {note}" for note in found.notes)]))
