"""The plans of docs/*/plan-115b.md (TeleChat2-115B on 4,096 and 8,192 chips) and docs/*/growth.md (52 B, 102 B and 1 T
by growth, on clusters of three makes).

    python benchmarks/plan_report.py
    python benchmarks/plan_report.py growth
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from anychip.plan.answer import PlanAnswer, answer_plan
from anychip.plan.layouts import parse_layout
from anychip.plan.machine import machine_of_chip, machines_of
from anychip.plan.question import ask
from anychip.plan.recipe_plan import plan_recipe, totals
from anychip.plan.shapes import num_parameters, workload_of
from anychip.plan.sites import default_site, trained_here
from anychip.recipe import load_recipe
from anychip.recipe.cluster import load_cluster

ROOT = Path(__file__).parents[1]
CHIP = "ascend-910b3"
PUBLISHED_RATE = 157.29  # tokens/s of one device, README of TeleChat2
GROWTH_CLUSTERS = ("ascend-910b-8192", "ascend-910c-cloudmatrix384", "mlu590-1024")


def report_115b() -> None:
    recipe = load_recipe(ROOT / "recipes" / "telechat2-115b.yaml")
    workload = workload_of(recipe)
    published = default_site(CHIP)  # of the software that the published layout ran in, its memory included
    site = trained_here(published)
    one = replace(workload, global_batch=64)
    layout = parse_layout("dp8 tp8 pp8 vpp3 mbs1 zero1", one, 512)
    found = answer_plan(one, machine_of_chip(CHIP, 512), published, 10e12, layout).chosen
    slow, fast = (one.tokens / 512 / seconds for seconds in reversed(found.interval))
    print(f"published layout: {found.tokens_per_second_per_device:.0f} ({slow:.0f} to {fast:.0f}) tokens/s a device")
    print(f"published rate: {PUBLISHED_RATE}; error {found.tokens_per_second_per_device / PUBLISHED_RATE - 1:+.1%}\n")
    heading()
    for devices in (4096, 8192):
        cluster = load_cluster(ROOT / "clusters" / f"ascend-910b-{devices}.yaml")
        machine = machines_of(cluster)[0]
        line(answer_plan(workload, machine, site, 10e12, failures=cluster.failures))
        given = parse_layout("tp8 pp8 vpp3 mbs1 zero1", workload, devices)
        line(answer_plan(workload, machine, published, 10e12, given, cluster.failures))


def report_growth() -> None:
    """What `anychip plan recipes/teleflm-1t.yaml --cluster FILE` says of each model, as a table."""
    recipe = ROOT / "recipes" / "teleflm-1t.yaml"
    for name in GROWTH_CLUSTERS:
        question = ask(recipe, cluster=ROOT / "clusters" / f"{name}.yaml")
        plans = plan_recipe(question)
        print(f"\n{name}\n")
        heading()
        for plan in plans:
            if plan.answer is None:
                print(f"| {plan.model.title}: {plan.reason} |" + " |" * 9)
            else:
                line(plan.answer)
        if (total := totals(plans)) is not None:
            low, high = total["days_interval"]
            energy = "power unknown" if total["energy_mwh"] is None else f"{total['energy_mwh']:,.0f} MWh"
            print(f"\nall models: {total['days']:,.1f} days ({low:,.1f} to {high:,.1f}), {energy}")


def heading() -> None:
    columns = ("model", "tokens", "devices", "layout", "tokens/s a device", "MFU", "GiB", "days without failures",
               "days", "useful time", "MWh")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def line(answer: PlanAnswer) -> None:
    chosen, found = answer.chosen, answer.goodput
    low, high = found.days_interval
    size = num_parameters(answer.workload) / 1e9
    energy = "" if found.energy_mwh is None else f"{found.energy_mwh:,.0f}"
    print(
        f"| {answer.workload.name} ({size:,.1f} B) | {answer.total_tokens / 1e12:.4g} T | {answer.machine.devices:,} "
        f"| {chosen.layout} | {chosen.tokens_per_second_per_device:,.0f} | {chosen.mfu:.1%} "
        f"| {chosen.memory_bytes / 2**30:.1f} | {answer.days:,.1f} | {found.days:,.1f} ({low:,.1f} to {high:,.1f}) "
        f"| {found.effective:.1%} | {energy} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", choices=("115b", "growth"), help="default: both")
    wanted = parser.parse_args().report
    if wanted != "growth":
        report_115b()
    if wanted != "115b":
        report_growth()
