"""The plans of docs/*/plan-115b.md: TeleChat2-115B on 4,096 and 8,192 chips, and the growth to a trillion parameters.

python benchmarks/plan_report.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from anychip.plan.answer import PlanAnswer, answer_plan
from anychip.plan.layouts import parse_layout
from anychip.plan.machine import machine_of_chip, machines_of
from anychip.plan.shapes import num_parameters, workload_of
from anychip.plan.sites import default_site
from anychip.plan.types import Workload
from anychip.recipe import load_recipe
from anychip.recipe.cluster import FailureConfig, load_cluster

ROOT = Path(__file__).parents[1]
CHIP = "ascend-910b3"
PUBLISHED_RATE = 157.29  # tokens/s of one device, README of TeleChat2
# Shapes of the published Tele-FLM files; those of 102B are from memory. Tokens of each stage: 2.0 T, 0.3 T, 0.0157 T.
BASE = Workload("tele-flm-52b", 64, 8192, 21_824, 64, 64, 128, 80_000, 4096, 1024, biases="none")
GROWTH = (
    (BASE, 2.0e12),
    (replace(BASE, name="tele-flm-102b", layers=80, hidden=10_240, ffn=27_264, heads=80, kv_heads=80), 0.3e12),
    (replace(BASE, name="tele-flm-1t", layers=140, hidden=20_480, ffn=98_304, heads=160, kv_heads=160), 0.0157e12),
)


def main() -> None:
    recipe = load_recipe(ROOT / "recipes" / "telechat2-115b.yaml")
    workload = workload_of(recipe)
    site = default_site(CHIP)
    one = replace(workload, global_batch=64)
    layout = parse_layout("dp8 tp8 pp8 vpp3 mbs1 zero1", one, 512)
    found = answer_plan(one, machine_of_chip(CHIP, 512), site, 10e12, layout).chosen
    slow, fast = (one.tokens / 512 / seconds for seconds in reversed(found.interval))
    print(f"published layout: {found.tokens_per_second_per_device:.0f} ({slow:.0f} to {fast:.0f}) tokens/s a device")
    print(f"published rate: {PUBLISHED_RATE}; error {found.tokens_per_second_per_device / PUBLISHED_RATE - 1:+.1%}\n")
    heading()
    for devices in (4096, 8192):
        cluster = load_cluster(ROOT / "clusters" / f"ascend-910b-{devices}.yaml")
        machine = machines_of(cluster)[0]
        for failures in (FailureConfig(), cluster.failures):
            line(answer_plan(workload, machine, site, 10e12, failures=failures))
        given = parse_layout("tp8 pp8 vpp3 mbs1 zero1", workload, devices)
        line(answer_plan(workload, machine, site, 10e12, given, cluster.failures))
    print()
    heading()
    cluster = load_cluster(ROOT / "clusters" / "ascend-910b-8192.yaml")
    total = 0.0
    for stage, tokens in GROWTH:
        answer = answer_plan(stage, machines_of(cluster)[0], site, tokens, failures=cluster.failures)
        total += answer.goodput.days
        line(answer)
    print(f"\nall three stages: {total:.1f} days")


def heading() -> None:
    print("| model | devices | layout | tokens/s a device | MFU | GiB | days without failures | days | useful time |")
    print("|---|---|---|---|---|---|---|---|---|")


def line(answer: PlanAnswer) -> None:
    chosen, found = answer.chosen, answer.goodput
    low, high = found.days_interval
    size = num_parameters(answer.workload) / 1e9
    print(
        f"| {answer.workload.name} ({size:,.1f} B) | {answer.machine.devices:,} | {chosen.layout} "
        f"| {chosen.tokens_per_second_per_device:,.0f} | {chosen.mfu:.1%} | {chosen.memory_bytes / 2**30:.1f} "
        f"| {answer.days:,.1f} | {found.days:,.1f} ({low:,.1f} to {high:,.1f}) | {found.effective:.1%} |"
    )


if __name__ == "__main__":
    main()
