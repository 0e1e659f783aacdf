"""How fast the planner is on one core: layouts a second, full searches, and a cold start.

OMP_NUM_THREADS=1 python benchmarks/plan_speed.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

from anychip.plan.machine import machine_of_chip
from anychip.plan.predict import predict_many
from anychip.plan.search import search
from anychip.plan.sites import default_site
from anychip.plan.types import Experts, Layout, Workload

DENSE = Workload("telechat2-115b", 96, 8192, 40_960, 64, 8, 128, 131_072, 8192, 1024, biases="telechat2")
MOE = replace(DENSE, name="moe-1t", layers=80, ffn=24_576, global_batch=4096, experts=Experts(128, 8, 4096, 4096, 3))
CHIP = "ascend-910b3"
COLD = """
from pathlib import Path
from anychip.plan.machine import machine_of_chip
from anychip.plan.predict import predict
from anychip.plan.shapes import workload_of
from anychip.plan.sites import default_site
from anychip.plan.types import Layout
from anychip.recipe.load import load_recipe
workload = workload_of(load_recipe(Path("recipes/telechat2-115b.yaml")))
layout = Layout(dp=128, tp=8, pp=8, vpp=3, schedule="interleaved", recompute="full")
predict(workload, layout, machine_of_chip("ascend-910b3", 8192), default_site("ascend-910b3"))
"""


def main() -> None:
    site = default_site(CHIP)
    for workload, devices in ((DENSE, 8192), (MOE, 16_384)):
        machine = machine_of_chip(CHIP, devices)
        layouts = [Layout(dp=devices // (8 * pp), tp=8, pp=pp, micro_batch=1) for pp in (1, 2, 4, 8, 16)] * 2000
        table = predict_many(workload, layouts, machine, site).table
        best = min(_seconds(lambda: predict_many(workload, table, machine, site)) for _ in range(10))  # noqa: B023
        print(f"{workload.name:16s} closed form with memory: {len(table) / best:,.0f} layouts/s")
        found = search(workload, machine, site)
        print(f"{workload.name:16s} full search on {devices} chips: {found.seconds:.2f} s, {found.considered} layouts")
        print(f"{'':16s} {found.best[0].layout}: {found.best[0].tokens_per_second_per_device:,.0f} tokens/s/device")
    cold = min(_seconds(lambda: subprocess.run([sys.executable, "-c", COLD], check=True)) for _ in range(3))
    print(f"{'':16s} cold start, one fixed layout: {cold:.2f} s")


def _seconds(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
