"""How accurate the planner is: the table of docs, and the shipped site files behind it.

    python benchmarks/plan_accuracy.py DATA                  # cross-validated errors beside the one-line baseline
    python benchmarks/plan_accuracy.py DATA --write-sites    # refit anychip/plan/sites/*.yaml

DATA holds runs.csv, vtrain_multi.csv and vtrain_single.csv in the formats of `anychip plan validate`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from anychip.plan.calibrate import chip_family, cross_validate, facts_of, fit_tree, predict_runs, spread
from anychip.plan.rows import Run, read_rows
from anychip.plan.sites import FOLDER, write_site
from anychip.plan.validate import Metrics, baseline_seconds, metrics, predicted_memory

GPU_CHIPS = ("a100-80g", "a100-40g", "h100-sxm", "b200-sxm", "tpu-v4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write-sites", action="store_true")
    options = parser.parse_args()
    published, multi, single = (
        read_rows(options.data / name)[0] for name in ("runs.csv", "vtrain_multi.csv", "vtrain_single.csv")
    )
    if options.write_sites:
        write_sites([run for run in published + multi + single if run.seconds and run.named_chip])
    else:
        print_table(published, multi, single)


def table_1(run: Run) -> bool:
    """arXiv 2104.04473, table 1: never fitted on."""
    return run.id.startswith("mlm-sc21-t1")


def write_sites(runs: Sequence[Run]) -> None:
    """Fit the tree on everything but table 1; each leaf's spread is that of the leave-one-model-out predictions."""
    fitted_on = [run for run in runs if not table_1(run)]
    tree = fit_tree(fitted_on)
    held = cross_validate(fitted_on, lambda run: run.model)
    measured = np.array([run.seconds for run in fitted_on])
    for name, site in tree.sites.items():
        own = [index for index, run in enumerate(fitted_on) if tree.site_for(run).name == name]
        below = own or [i for i, run in enumerate(fitted_on) if name.startswith("all") or chip_family(run.chip) in name]
        sigma = round(max(0.03, spread(held[below], measured[below])), 3)
        publishers = sorted({fitted_on[index].publisher for index in below})
        source = f"{len(below)} runs of {', '.join(publishers)}; spread held out by model"
        path = FOLDER / f"{name.replace('/', '_')}.yaml"
        write_site(replace(site, relative_sigma=sigma, source=source), path)
        print(f"{path.name:45s} {len(below):4d} runs, spread {sigma:.3f}")


def print_table(published: list[Run], multi: list[Run], single: list[Run]) -> None:
    timed = [run for run in published if run.seconds]
    gpu = [run for run in timed if run.chip in GPU_CHIPS]
    ascend = [run for run in timed if chip_family(run.chip) == "ascend-910b" and run.named_chip]
    first = [run for run in timed if table_1(run)]
    tree = fit_tree(multi + single)
    row("T1, fitted on vTrain alone", first, predict_runs(first, tree.site_for))
    row("vTrain multi, without the model (40 rows)", multi, cross_validate(multi, lambda run: run.model))
    old = multi + single
    held = cross_validate(old, lambda run: run.model)
    row("vTrain multi, without the model", multi, held[: len(multi)])
    row("vTrain single, without the model", single, held[len(multi) :])
    row("vTrain single, fitted", single, predict_runs(single, tree.site_for))
    held = cross_validate(ascend, lambda run: run.model)
    row("Ascend 910B, without the model", ascend, held)
    for software in ("mindspeed", "mindformers"):
        part(f"  {software}", ascend, held, lambda run, software=software: run.software == software)
    everything = gpu + multi + single
    for label, key in (("source column", lambda run: run.source), ("publisher", lambda run: run.publisher)):
        held = cross_validate(everything, key)
        part(f"A100 H100 B200 TPU, without the {label}", everything, held, lambda run: "vTrain" not in run.publisher)
        for family in ("a100", "h100", "b200", "tpu"):
            part(
                f"  {family}", everything, held,
                lambda run, family=family: chip_family(run.chip) == family and "vTrain" not in run.publisher,
            )  # fmt: skip
        part("  with vTrain's rows", everything, held, lambda run: True)
    print()
    for label, chosen in (
        ("memory, SimuMax B200", [run for run in published if run.memory_bytes and "SimuMax" in run.publisher]),
        ("memory, other rows", [run for run in published if run.memory_bytes and "SimuMax" not in run.publisher]),
    ):
        predicted = np.array([predicted_memory(run, facts_of(run)) for run in chosen])
        measured = np.array([run.memory_bytes for run in chosen])
        show(label, metrics(predicted, measured, [run.id for run in chosen]), None)


def part(label: str, runs: Sequence[Run], predicted: np.ndarray, keep: Callable[[Run], bool]) -> None:
    chosen = [index for index, run in enumerate(runs) if keep(run)]
    row(label, [runs[index] for index in chosen], predicted[chosen])


def row(label: str, runs: Sequence[Run], predicted: np.ndarray) -> None:
    measured = np.array([run.seconds for run in runs])
    groups = [run.group for run in runs]
    baseline = metrics(np.array([baseline_seconds(run) for run in runs]), measured, groups)
    show(label, metrics(predicted, measured, groups), baseline)


def show(label: str, found: Metrics, baseline: Metrics | None) -> None:
    order = "" if found.pair_order is None else f"  order {found.pair_order:.2f}  regret {found.regret:.1%}"
    beside = f"  | baseline {baseline.mean:.1%} / {baseline.median:.1%}" if baseline else ""
    print(
        f"{label:48s} {found.runs:4d} rows  mean {found.mean:.1%}  median {found.median:.1%}  p90 {found.p90:.1%}  "
        f"bias {found.bias:+.1%}{order}{beside}",
        flush=True,
    )


if __name__ == "__main__":
    main()
