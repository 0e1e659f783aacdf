"""Keeping a run alive, and saying what happened to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import RUNS, RecipeArgument, RunArgument, RunsOption, SetOption

_OF_SEVERAL_HOSTS = ("token_file", "interface", "bind", "node_name", "lease", "settle", "patience")


def supervise(
    context: typer.Context,
    recipe: RecipeArgument,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this host, one a chip.")] = 1,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
    restarts: Annotated[int, typer.Option(min=0, help="Starts without progress between them before giving up.")] = 20,
    min_processes: Annotated[
        int, typer.Option(min=0, help="One host: go on with as few when a chip keeps failing.")
    ] = 0,
    nodes: Annotated[str | None, typer.Option(help="Several hosts: MIN:MAX of them, or one number.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="Several hosts: HOST:PORT. The host of this address keeps the coordinator alive.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="Several hosts: a file with the job's secret.")] = None,
    interface: Annotated[str | None, typer.Option(help="The network interface to listen on.")] = None,
    bind: Annotated[str | None, typer.Option(help="The address to listen on, instead of an interface.")] = None,
    node_name: Annotated[str | None, typer.Option(help="This host's name; default: what the system says.")] = None,
    lease: Annotated[float, typer.Option(min=1, help="Seconds without the coordinator until a host gives up.")] = 5.0,
    settle: Annotated[float, typer.Option(min=0, help="Seconds to wait for more hosts than are needed.")] = 5.0,
    patience: Annotated[float, typer.Option(min=1, help="Seconds to wait for hosts that are needed.")] = 600.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds to save in when asked to stop, or when a host leaves or comes.")
    ] = 60.0,
    start_seconds: Annotated[
        float, typer.Option(help="Silence before the first step, or at the end, that is a hang.")
    ] = 600.0,
    quiet_seconds: Annotated[
        float, typer.Option(help="Silence in a save, an evaluation and the like that is a hang while none is known.")
    ] = 120.0,
    coordinate: Annotated[bool, typer.Option("--coordinate", help="Only coordinate; no training here.")] = False,
) -> None:
    """Train in several processes of this host, or of many, and start again after what can be survived."""
    from anychip.errors import InputError
    from anychip.stages import open_run
    from anychip.supervise import many_hosts, one_host
    from anychip.supervise.coordinator import Terms
    from anychip.supervise.run import Limits
    from anychip.supervise.silences import Patience
    from anychip.train.output import print_what_fits

    print_what_fits()
    loaded, run = open_run(recipe, overrides or [], runs)
    words = [word for setting in overrides or [] for word in ("--set", setting)]
    arguments = [str(recipe), "--runs", str(runs), *words]
    limits = Limits(restarts, Patience(start_seconds, quiet_seconds), grace)
    given = [f"--{name.replace('_', '-')}" for name in _OF_SEVERAL_HOSTS if _is_given(context, name)]
    if nodes is None and coordinator is None and not coordinate:
        if given:
            do = "Give --nodes, --coordinator and --token-file as well, or leave them out."
            raise InputError("several hosts only, and one host was asked for.", where=", ".join(given), do=do)
        one_host.supervise(loaded, run, arguments, processes, limits, min_processes)
        return
    if nodes is None or coordinator is None or token_file is None:
        raise InputError("several hosts need --nodes, --coordinator and --token-file.", do="Give all three.")
    if min_processes:
        raise InputError(
            "is for one host.", where="--min-processes", do="The least number of hosts is in --nodes MIN:MAX."
        )
    place = many_hosts.Place(many_hosts.parse_place(coordinator), token_file, interface, bind, node_name)
    terms = Terms(*many_hosts.parse_nodes(nodes), lease, settle, patience)
    if coordinate:
        many_hosts.coordinate(loaded, run, place, terms, limits)
        return
    numbers = {"restarts": restarts, "lease": lease, "settle": settle, "patience": patience, "grace": grace}
    numbers |= {"start-seconds": start_seconds, "quiet-seconds": quiet_seconds}
    options = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    options += ["--nodes", nodes, "--coordinator", coordinator, "--token-file", str(token_file), "--coordinate"]
    many_hosts.serve_host(loaded, run, arguments, [*arguments, *options], processes, place, terms)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def explain(run_directory: RunArgument) -> None:
    """Say in sentences how far a run came, what went wrong, and what to do."""
    from anychip.rundir import RunDirectory
    from anychip.supervise.explain import explain

    typer.echo(explain(RunDirectory(run_directory)))


def chaos(
    recipe: RecipeArgument,
    processes: Annotated[int, typer.Option(min=1, help="Processes, of all hosts together.")] = 2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same faults.")] = 0,
    faults: Annotated[int, typer.Option(min=1, help="How many; exit code 3 when fewer struck.")] = 30,
    hosts: Annotated[int, typer.Option(min=1, max=100, help="Hosts, as agents on this machine.")] = 1,
    overrides: SetOption = None,
    runs: RunsOption = Path("runs/chaos"),
) -> None:
    """Train under faults on purpose, and compare with a run that had none."""
    import sys

    from anychip.errors import EXIT_UNFIT
    from anychip.recipe import load_recipe
    from anychip.supervise.chaos import chaos, networks

    words = [word for setting in overrides or [] for word in ("--set", setting)]
    loaded = load_recipe(recipe, overrides or [])
    if hosts > 1 and not networks.is_inside():
        if problem := networks.problem():
            typer.echo(f"no partitions: network namespaces cannot be made here ({problem})", err=True)
        else:
            numbers = {"processes": processes, "seed": seed, "faults": faults, "hosts": hosts}
            options = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
            sys.stdout.flush()
            networks.start_again_inside(["chaos", str(recipe), *options, *words, "--runs", str(runs)])
    inside = networks.is_inside()
    result = chaos(loaded, recipe, words, runs / f"seed-{seed}", processes, seed, faults, hosts, inside)
    typer.echo(result.describe())
    if not result.is_good:
        raise typer.Exit(EXIT_UNFIT)
