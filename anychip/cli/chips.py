"""The chips that are known and the one at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anychip.cli.options import JsonOption


def chips(as_json: JsonOption = False) -> None:
    """List the chips that are known, with their figures, and what is detected here."""
    import json

    from anychip.chips.listing import chips_as_json, chips_as_text

    typer.echo(json.dumps(chips_as_json(), indent=2, ensure_ascii=False) if as_json else chips_as_text())


def doctor(as_json: JsonOption = False) -> None:
    """Check that torch, plug-in, driver and devices here fit together; exit code 3 when they do not."""
    import json

    from anychip.chips.doctor import examine
    from anychip.errors import EXIT_UNFIT

    report = examine()
    typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False) if as_json else report.as_text())
    if not report.fit:
        raise typer.Exit(EXIT_UNFIT)


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
