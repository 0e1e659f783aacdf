"""Is the chip fit, and do two runs compute the same?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RUNS, JsonOption, RecipeArgument, RunsOption, SetOption

TraceArgument = typer.Argument(metavar="TRACE", help="A trace, or a dump folder of msprobe.")


def probe(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that the chip at hand computes what a recipe needs; exit code 3 when it is unfit."""
    import json

    from anychip.errors import EXIT_UNFIT
    from anychip.recipe import load_recipe
    from anychip.report.probe_page import write_probe_page
    from anychip.rundir import RunDirectory
    from anychip.verify.probe.run import probe as run_probe
    from anychip.verify.probe.run import write_results

    loaded = load_recipe(recipe, overrides or [])
    run = RunDirectory(runs / loaded.name)
    report = run_probe(loaded, run.probe, fresh=fresh, quiet=as_json)
    write_results(report, run.probe)
    write_probe_page(report, run.probe / "probe.html")
    report.profile().write(run.chip_profile)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        typer.echo(f"{report.as_text()}\n  report: {run.probe / 'probe.html'}, profile: {run.chip_profile}")
    if report.verdict.fitness == "unfit":
        raise typer.Exit(EXIT_UNFIT)


def trace(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    interval: Annotated[int, typer.Option(min=1, help="Steps between traced ones; the first one is traced too.")] = 100,
    out: Annotated[Path | None, typer.Option(help="The trace; default: trace.jsonl of the run.")] = None,
    megabytes: Annotated[int, typer.Option(min=0, help="Size at which only losses are written on.")] = 512,
) -> None:
    """Pretrain, and record activations, gradients and updates by logical name, for `verify compare`."""
    from anychip.stages import open_run, trace_run

    trace_run(*open_run(recipe, overrides or [], runs), interval=interval, out=out, max_bytes=megabytes * 10**6)


def compare(
    first: Annotated[Path, TraceArgument],
    second: Annotated[Path, TraceArgument],
    false_alarms: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="Chance that equal loss curves are called diverged.")
    ] = 0.01,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Difference of losses that is borne, as a share.")] = 0.001,
    as_json: JsonOption = False,
) -> None:
    """Find the first tensor in which two runs part, and judge their losses; exit code 3 when they part."""
    import json

    from anychip.errors import EXIT_UNFIT
    from anychip.verify.compare import compare as compare_traces
    from anychip.verify.compare import read_either

    traces = read_either(first), read_either(second)
    found = compare_traces(*traces, false_alarms=false_alarms, tolerance=tolerance)
    typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False) if as_json else found.as_text())
    if not found.passes:
        raise typer.Exit(EXIT_UNFIT)
