"""Memory of single ranks by term: what the planner says beside what a dry run counts, with the dry run's own time and
memory. Recipes and sizes are those of docs/*/experts.md; the first, a middle and the last stage of each pipeline.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py moe-1t teleflm-1t-direct
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from anychip.plan.layouts import layout_of
from anychip.plan.machine import machine_of_chip
from anychip.plan.predict import GIB, predict
from anychip.plan.shapes import workload_of
from anychip.plan.sites import default_site, trained_here
from anychip.recipe import load_recipe

ROOT = Path(__file__).parents[1]
CHIP = "ascend-910b3"
PROCESSES = {"telechat3-105b": 4096, "moe-1t": 16_384, "teleflm-1t-direct": 16_384}
TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def planned(recipe_path: Path, size: int, stage: int) -> dict[str, float]:
    """Bytes by term on one stage of the recipe's own layout."""
    recipe = load_recipe(recipe_path)
    site = trained_here(default_site(CHIP))
    found = predict(workload_of(recipe), layout_of(recipe, size), machine_of_chip(CHIP, size), site)
    return {term: float(found.memory[term][stage]) for term in TERMS}


def counted(recipe_path: Path, size: int, rank: int) -> dict[str, Any]:
    words = [str(recipe_path), "--dry-run", "--world-size", str(size), "--rank", str(rank), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "anychip", "train", *words], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(name: str) -> None:
    path, size = ROOT / "recipes" / f"{name}.yaml", PROCESSES[name]
    stages = load_recipe(path).parallel.pipeline_parallel
    print(f"\n{name}, {size:,} processes; GiB, planned / counted\n")
    print(f"| stage (rank) | {' | '.join(TERMS)} | sum | dry run |")
    print(f"|---|{'---|' * (len(TERMS) + 2)}")
    for stage in sorted({0, stages // 2, stages - 1}):
        rank = stage * (size // stages) + 1
        plan, dry = planned(path, size, stage), counted(path, size, rank)
        cells = [cell(plan[term], dry["memory"][term]) for term in TERMS]
        total = cell(sum(plan.values()), dry["total_bytes"])
        took = f"{sum(dry['seconds'].values()):.0f} s, {dry['resident_bytes'] / 1e9:.1f} GB"
        print(f"| {stage} ({rank:,}) | {' | '.join(cells)} | {total} | {took} |", flush=True)


def cell(plan: float, dry: float) -> str:
    error = f" ({plan / dry - 1:+.1%})" if dry else ""
    return f"{plan / GIB:.2f} / {dry / GIB:.2f}{error}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(PROCESSES), help=", ".join(PROCESSES))
    for recipe in parser.parse_args().recipes:
        compare(recipe)
