"""The model card of a release: that of the export, and where everything came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anychip.attest.check.history import History
from anychip.attest.costs import count_costs
from anychip.interchange.model_card import model_card
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory

_VERDICTS = ("verdict", "fit", "result")


def release_card(
    recipe: Recipe, run: RunDirectory, conversion: dict[str, Any], history: History, verification: Mapping[str, Path]
) -> str:
    """Markdown. `verification` are reports by their names in the release."""
    sections = [
        model_card(recipe, run, conversion).rstrip(),
        "\n".join(["## Chips, hours, energy", "", *count_costs(history).lines()]),
        "\n".join(["## Lineage", "", *_lineage(history)]),
        _verification(verification),
        _attestation(history),
    ]
    return "\n\n".join(sections) + "\n"


def _lineage(history: History) -> list[str]:
    """One line a stage, from the first state to the exported one."""
    assert history.export is not None
    line = list(reversed(history.lineage(history.export["state"])))
    kinds = dict(zip(history.digests, history.links, strict=True))
    found = []
    for place, state in enumerate(line):
        stage, step = history.states[state]
        ends = place + 1 == len(line) or history.states[line[place + 1]][0] != stage
        link = kinds[state]
        if link["kind"] == "derived":
            found.append(f"- {stage}: {link['body']['how']}, at step {step}")
        elif ends:
            found.append(f"- {stage}: trained to step {step}")
    again = sum(link["kind"] == "rollback" for link in history.links)
    return [*found, f"- times back to an older state: {again}"]


def _verification(reports: Mapping[str, Path]) -> str:
    if not reports:
        return "## Verification\n\nNo report of `anychip probe` or `anychip verify` is part of this release."
    return "\n".join(["## Verification", "", *(f"- `{name}`{_verdict(path)}" for name, path in reports.items())])


def _verdict(path: Path) -> str:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    said = next((report[key] for key in _VERDICTS if isinstance(report, dict) and key in report), None)
    return f": {said}" if isinstance(said, str | bool) else ""


def _attestation(history: History) -> str:
    return (
        "## Attestation\n\n"
        f"`attestation/` holds a chain of {len(history.links)} links from the pinned inputs to these files, and "
        "signatures on it. With the operator's public key, offline:\n\n"
        "```bash\nanychip attest check PATH_OF_THIS_DIRECTORY --operator OPERATOR.pub.pem\n```\n\n"
        "It says what this shows and what it does not."
    )
