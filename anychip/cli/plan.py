"""Planning: which layout, how fast, how much memory, how many days."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anychip.cli.options import RUNS, JsonOption, RecipeArgument, RunsOption, SetOption, one_of

if TYPE_CHECKING:
    from anychip.plan.types import Machine, Site, Workload
    from anychip.recipe import Recipe
    from anychip.recipe.cluster import FailureConfig

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
RunsCsvOption = Annotated[list[Path], typer.Option("--runs", help="A CSV of measured runs; may be given again.")]


def layouts(
    recipe: RecipeArgument,
    cluster: ClusterOption = None,
    overrides: SetOption = None,
    chip: ChipOption = None,
    devices: DevicesOption = None,
    seq_length: SeqLengthOption = None,
    site: SiteOption = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the whole job, such as 10e12.")] = None,
    fixed: Annotated[bool, typer.Option("--fixed", help="The recipe's own layout instead of a search.")] = False,
    bench: BenchOption = None,
    html: Annotated[Path | None, typer.Option(help="File for a page with pictures.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the plan with the run: the log will show it.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """The ten best layouts of a recipe: time, memory, days. This is what `anychip plan RECIPE` does."""
    import json

    from anychip.plan.answer import answer_plan
    from anychip.plan.answer import as_json as answer_json
    from anychip.plan.layouts import layout_of
    from anychip.plan.saved import save_plan
    from anychip.plan.text import answer_as_text
    from anychip.rundir import RunDirectory

    read, workload, machines, failures = _asked(recipe, cluster, overrides, chip, devices, seq_length, bench)
    total = tokens or float(read.training.steps * workload.tokens)
    if len(machines) > 1:
        _mixed(workload, cluster, machines, total, as_json)
        return
    wanted = layout_of(read, machines[0].devices) if fixed else None
    answer = answer_plan(workload, machines[0], _site(site, machines[0], bench, workload), total, wanted, failures)
    if save:
        save_plan(answer, read, RunDirectory(runs / read.name).plan)
    if html is not None:
        from anychip.report.plan_page import write_plan_page

        write_plan_page(answer, html)
    typer.echo(json.dumps(answer_json(answer), indent=2) if as_json else answer_as_text(answer))


def explain(
    recipe: RecipeArgument,
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help='Such as "tp8 pp8 vpp3 mbs1 zero1 interleaved".')],
    cluster: ClusterOption = None,
    overrides: SetOption = None,
    chip: ChipOption = None,
    devices: DevicesOption = None,
    seq_length: SeqLengthOption = None,
    site: SiteOption = None,
    bench: BenchOption = None,
    as_json: JsonOption = False,
) -> None:
    """One layout of a recipe: where its time goes, what fills its memory, why it does not fit."""
    import json

    from anychip.plan.answer import answer_plan, prediction_json
    from anychip.plan.layouts import parse_layout
    from anychip.plan.text import explanation

    read, workload, machines, failures = _asked(recipe, cluster, overrides, chip, devices, seq_length, bench)
    machine, total = machines[0], float(read.training.steps * workload.tokens)
    wanted = parse_layout(layout, workload, machine.devices)
    answer = answer_plan(workload, machine, _site(site, machine, bench, workload), total, wanted, failures)
    typer.echo(json.dumps(prediction_json(answer.chosen), indent=2) if as_json else explanation(answer))


def validate(
    runs: RunsCsvOption,
    site: SiteOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for every row's prediction.")] = None,
) -> None:
    """How far the planner is from measured runs, beside the one-line baseline."""
    from anychip.files import write_json
    from anychip.plan.sites import load_site
    from anychip.plan.text import validation_as_text
    from anychip.plan.validate import validate as validate_runs

    report = validate_runs(runs, load_site(site) if site else None)
    if json_file is not None:
        write_json(json_file, report.as_json())
    typer.echo(validation_as_text(report))


def calibrate(
    runs: RunsCsvOption,
    out: Annotated[Path, typer.Option(help="Site file to write.")],
    start: Annotated[str | None, typer.Option(help="Site to start from; default: the shipped one of the runs.")] = None,
) -> None:
    """Fit a site's few scalars to measured runs; print its error on runs that it was not fitted to."""
    from anychip.plan.calibrate import calibrate as fit
    from anychip.plan.rows import read_files
    from anychip.plan.sites import load_site, write_site
    from anychip.plan.text import calibration_as_text
    from anychip.plan.validate import default_site_of

    found, skipped = read_files(runs)
    begin = load_site(start) if start else default_site_of(found[0])
    calibration = fit(found, begin, out.stem, skipped)
    write_site(calibration.site, out)
    typer.echo(f"{calibration_as_text(calibration, begin)}\nwrote {out}")


def _asked(
    recipe: Path, cluster: Path | None, overrides: list[str] | None, chip: str | None, devices: int | None,
    seq_length: int | None, bench: Path | None,
) -> tuple[Recipe, Workload, tuple[Machine, ...], FailureConfig]:  # fmt: skip
    """The recipe, its step, the machines and how they fail, with what the flags change."""
    from dataclasses import replace

    from anychip.errors import InputError
    from anychip.plan.answer import changed_cluster, cluster_of, with_seq_length
    from anychip.plan.local import machine_of_bench, memory_here, read_bench
    from anychip.plan.machine import machines_of
    from anychip.plan.shapes import workload_of
    from anychip.recipe import load_recipe
    from anychip.recipe.cluster import FailureConfig, load_cluster

    read = load_recipe(recipe, overrides or [])
    workload = workload_of(read)
    if seq_length is not None:
        workload = with_seq_length(workload, seq_length)
    if devices is not None and devices < 1:
        raise InputError(f"--devices is {devices}.", do="Give at least 1.")
    if bench is not None:
        measured = read_bench(bench)
        if read.training.compute_dtype == "auto" and not measured.get("bf16_in_hardware", True):
            workload = replace(workload, dtype="fp32")
        return read, workload, (machine_of_bench(measured, devices or 1, memory_here()),), FailureConfig()
    if cluster is not None:
        asked = changed_cluster(load_cluster(cluster), chip, devices)
    elif chip is not None and devices is not None:
        asked = cluster_of(chip, devices)
    else:
        raise InputError("there is nothing to plan on.", do="Give --cluster FILE, or --chip with --devices.")
    return read, workload, machines_of(asked), asked.failures


def _site(name: str | None, machine: Machine, bench: Path | None, workload: Workload) -> Site:
    from anychip.plan.local import read_bench, site_of_bench
    from anychip.plan.sites import default_site, load_site

    if name:
        return load_site(name)
    return site_of_bench(read_bench(bench), workload.dtype) if bench else default_site(machine.chip)


def _mixed(workload: Workload, path: Path | None, machines: tuple[Machine, ...], total: float, as_json: bool) -> None:
    """A cluster of several kinds of chips: which stages go where."""
    import json

    from anychip.plan.mixed import mixed_json, search_mixed
    from anychip.plan.sites import default_site
    from anychip.plan.text import mixed_as_text
    from anychip.recipe.cluster import load_cluster

    assert path is not None
    cluster = load_cluster(path)
    between = (cluster.between_groups_gbit_per_s or 100.0) * 1e9 / 8
    result = search_mixed(workload, machines, [default_site(machine.chip) for machine in machines], between)
    name = f"{workload.name} on {cluster.name}"
    typer.echo(json.dumps(mixed_json(result), indent=2) if as_json else mixed_as_text(name, result, total))


def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A script, YAML, TOML or config.json of others.")],
    out: Annotated[Path, typer.Option(help="Recipe to write.")],
    format: Annotated[
        str | None, typer.Option(help="megatron, mindformers, torchtitan or huggingface; default: by the file's name.")
    ] = None,
) -> None:
    """Write a recipe from a Megatron or MindSpeed script, a MindFormers or torchtitan file, or a config.json."""
    import yaml

    from anychip.files import write_text
    from anychip.plan.importers import import_recipe
    from anychip.plan.importers.read import KINDS

    kind = one_of(format, "format", KINDS) if format is not None else None
    found = import_recipe(source, kind)
    write_text(out, yaml.safe_dump(found.recipe, sort_keys=False))
    typer.echo("\n".join([f"wrote {out}", *(f"note: {note}" for note in found.notes)]))
