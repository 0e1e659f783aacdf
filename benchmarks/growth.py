"""What growth saves, what mapped moments are worth, and how fast a checkpoint grows.

`compute`: the grown shape trained from random weights, beside the small shape that grows into it, over the same batches
in the same order: tokens and training FLOPs until the grown one predicts held-out text as well as the other does at its
end, for each seed. Rates are constant after the warm-up, so that every point of a curve is a fair end; the grown model
may use as many FLOPs as the other. `moments`: the same small model grown with mapped and with reset moments, and what
both do in the steps after it. `stream`: growing a checkpoint file by file, beside a plain copy of the bytes it writes,
in turn, each in a process of its own (growth_stream.py); making the checkpoint takes as much memory as it is large.
Prints Markdown tables, with the spread over the seeds. `compute` and `moments` read a run's packed data, and begin with
the first model of its recipe; with the demo's, `compute` takes about an hour on two cores.

    anychip data prepare recipes/demo.yaml
    python benchmarks/growth.py compute runs/demo --curves curves.json --picture docs/growth-compute.svg
    python benchmarks/growth.py moments runs/demo
    python benchmarks/growth.py stream --gigabytes 4 --processes 2
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from growth_stream import stream, work

# Of the demo's model: 3.3 M to 13.5 M parameters.
GROWN = ["hidden_size=384", "intermediate_size=1152", "num_attention_heads=6", "num_key_value_heads=2",
         "num_hidden_layers=6"]  # fmt: skip
_STYLE = """<style>
svg { font-family: system-ui, sans-serif; background: #fff }
text { font-size: 11.5px; fill: #555 } .grid { stroke: #e4e4e4 } .axis { stroke: #999 }
polyline { fill: none; stroke-width: 2; opacity: .8 } .line-main { stroke: #1565c0 } .line-second { stroke: #c62828 }
</style>"""
Point = tuple[float, float, float]
"""Tokens, training FLOPs, bits per byte."""


class Learner:
    """A model that learns from a run's data in the recipe's order, by anychip's own step."""

    def __init__(self, recipe: Any, run: Any, model: Any, eval_tokens: int, growing: Any = None) -> None:
        from anychip.chips.backend import detect_backend
        from anychip.chips.operators import operators_for
        from anychip.data.loader import TrainingData
        from anychip.data.validation import validation_batches
        from anychip.model.arithmetic import flops_per_token
        from anychip.parallel.processes import Processes
        from anychip.train.engine import Engine
        from anychip.train.guard import Guard
        from anychip.train.heartbeat import Heartbeat
        from anychip.train.job import training_job
        from anychip.train.optimizer import Optimizer
        from anychip.train.precision import compute_dtype

        backend = detect_backend()
        backend.prepare_process()
        self.recipe, self.model, self.growing = recipe, model, growing
        self.data = TrainingData(run, recipe)
        self.held_out = list(validation_batches(run, recipe, recipe.training.micro_batch_size, eval_tokens))
        changed = recipe.model_copy(update={"model": model, "grow": []})
        job = training_job(changed, Path(), self.data, lambda parameters: None, None, "")
        self.processes = Processes.join(job.parallel, backend.device(0), backend.collective_backend)
        dtype, operators = compute_dtype(job.compute_dtype, backend), operators_for(backend.vendor, job.operators)
        self.engine = Engine(job, self.processes, dtype, operators)
        scales = growing.lr_scale() if growing else {}
        self.optimizer = Optimizer(self.engine.trainable, job.optimizer, dtype, operators, scales)
        self.new_parts = growing.bind(self.engine.trainable, self.optimizer) if growing else None
        self.guard, self.heartbeat = Guard(job.guard), Heartbeat.of_environment(0)
        self.step = growing.grown_at if growing else 0
        self.flops = 0.0
        length = recipe.training.seq_length
        self.batch_tokens = recipe.training.global_batch_size * length
        self.step_flops = flops_per_token(model, length).model * self.batch_tokens

    def begin(self) -> Learner:
        """With the recipe's random weights."""
        from anychip.parallel.parts import initialize_parts

        initialize_parts(self.engine.parameters, self.model, self.recipe.seed)
        return self

    def learn(self) -> float:
        """One step; its loss."""
        from anychip.train.schedule import lr_share
        from anychip.train.step import Growth, train_step

        config = self.recipe.optimizer
        schedule = config.schedule.model_copy(update={"kind": "constant"})
        lr = config.lr * lr_share(schedule, self.step, 1) * (self.growing.lr_share(self.step) if self.growing else 1.0)
        batch = self.data.batch(self.step)
        self.step += 1
        self.flops += self.step_flops
        growth = Growth(self.new_parts, self.step) if self.new_parts else None
        done = train_step(self.engine, self.optimizer, self.processes, batch, lr, config.grad_clip, self.guard,
                          self.heartbeat, growth=growth)  # fmt: skip
        return done.loss

    def bits_per_byte(self) -> float:
        import torch

        with torch.no_grad():
            nats = sum(self.engine.score(batch) for batch, _ in self.held_out)
        return nats / math.log(2) / sum(size for _, size in self.held_out)

    def state(self) -> dict[str, Any]:
        """As checkpoints name it."""
        named = {f"model.{name}": value.detach() for name, value in self.engine.parameters.items()}
        return named | {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}

    def grown(self, run: Any, eval_tokens: int, to: dict[str, Any], moments: str, mode: str) -> Learner:
        """A larger learner that goes on from here."""
        import torch

        from anychip.grow.opening import Growing
        from anychip.grow.plan import plan_growth
        from anychip.grow.state import grow_state
        from anychip.recipe.schema import GrowthConfig

        growth = GrowthConfig.model_validate({"at_tokens": 1, "to": to, "moments": moments, "mode": mode})
        plan = plan_growth(self.model, growth, self.recipe.seed)
        larger = Learner(self.recipe, run, plan.new, eval_tokens, Growing(plan, growth, self.step))
        larger.flops = self.flops
        state = grow_state(plan, self.state())
        with torch.no_grad():
            for name, tensor in larger.state().items():
                tensor.copy_(state[name])
        return larger


def shapes(arguments: argparse.Namespace) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(run, recipe, small model, what it grows into)."""
    from anychip.recipe import ModelConfig
    from anychip.rundir import RunDirectory

    run = RunDirectory(arguments.run)
    recipe = run.read_recipe()
    small = ModelConfig.model_validate(recipe.model.model_dump() | fields(arguments.small))
    return run, recipe, small, fields(arguments.grow)


def fields(words: Iterable[str]) -> dict[str, int]:
    return {name: int(value) for name, _, value in (word.partition("=") for word in words)}


def curve(learner: Learner, steps: int, flops: float, every: int, goal: float = 0.0) -> list[Point]:
    """From here to a step, an amount of FLOPs, or a goal, whichever comes first."""
    points = [(learner.step * learner.batch_tokens, learner.flops, learner.bits_per_byte())]
    while learner.step < steps and learner.flops < flops and points[-1][2] > goal:
        for _ in range(min(every, steps - learner.step)):
            learner.learn()
        points.append((learner.step * learner.batch_tokens, learner.flops, learner.bits_per_byte()))
    return points


def crossing(points: list[Point], goal: float) -> tuple[float, float] | None:
    """(tokens, FLOPs) where the curve comes to the goal, by straight lines between its points."""
    for (tokens, flops, high), (later, more, low) in pairwise(points):
        if low <= goal < high:
            share = (high - goal) / (high - low)
            return tokens + share * (later - tokens), flops + share * (more - flops)
    return None


def compute(arguments: argparse.Namespace) -> None:
    from anychip.grow.plan import grown_config
    from anychip.model.arithmetic import num_parameters

    run, recipe, small, to = shapes(arguments)
    large = grown_config(small, to)
    sizes = num_parameters(small), num_parameters(large)
    print(f"{sizes[0]:,} -> {sizes[1]:,} parameters ({sizes[1] / sizes[0]:.2f} times), growth after "
          f"{arguments.small_steps} steps, {arguments.mode}\n")  # fmt: skip
    print("| seed | from scratch: bits per byte | tokens | grown: tokens to the same | FLOPs, of scratch | saved |")
    print("|---|---|---|---|---|---|", flush=True)
    saved, curves = [], []
    for seed in range(arguments.seeds):
        seeded = recipe.model_copy(update={"seed": seed})
        alone = curve(Learner(seeded, run, large, arguments.eval_tokens).begin(), arguments.steps, math.inf,
                      arguments.every)  # fmt: skip
        scratch = alone[-1]
        learner = Learner(seeded, run, small, arguments.eval_tokens).begin()
        points = curve(learner, arguments.small_steps, scratch[1], arguments.every)
        larger = learner.grown(run, arguments.eval_tokens, to, "map", arguments.mode)
        points += curve(larger, sys.maxsize, scratch[1], arguments.every, scratch[2])
        curves.append({"seed": seed, "scratch": alone, "grown": points})
        if arguments.curves:
            arguments.curves.write_text(json.dumps(curves))
        if arguments.picture:
            arguments.picture.write_text(picture(curves), encoding="utf-8")
        reached = crossing(points, scratch[2])
        if reached is None:
            told = f"not reached with as many FLOPs: {points[-1][2]:.4f} | | "
        else:
            saved.append(1 - reached[1] / scratch[1])
            told = f"{reached[0]:,.0f} | {reached[1] / scratch[1]:.0%} | {saved[-1]:.0%}"
        print(f"| {seed} | {scratch[2]:.4f} | {scratch[0]:,.0f} | {told} |", flush=True)
    if saved:
        print(f"\nsaved FLOPs: {spread(saved, '.1%')} ({len(saved)} of {arguments.seeds} seeds)")


def picture(curves: list[dict[str, Any]]) -> str:
    """Held-out bits per byte over training FLOPs, every seed, as an SVG file: grown in blue, from scratch in red."""
    from anychip.report.charts import Series, line_chart

    series = [
        Series(f"{kind}, seed {row['seed']}", [(flops, bits) for _, flops, bits in row[kind] if flops], style)
        for row in curves
        for kind, style in (("scratch", "line-second"), ("grown", "line-main"))
    ]
    title = "Held-out bits per byte: grown (blue) and from scratch (red)"
    chart = str(line_chart(series, title, "training FLOPs; blue: grown, red: from scratch"))
    head, _, body = chart.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{_STYLE}{body}\n'


def moments(arguments: argparse.Namespace) -> None:
    run, recipe, small, to = shapes(arguments)
    print("| seed | moments | bits per byte before | after growth | worst rise of the loss in 10 steps | "
          f"bits per byte, every {arguments.every} steps |\n|---|---|---|---|---|---|", flush=True)  # fmt: skip
    ends: dict[str, list[float]] = {"map": [], "reset": []}
    for seed in range(arguments.seeds):
        learner = Learner(recipe.model_copy(update={"seed": seed}), run, small, arguments.eval_tokens).begin()
        losses = [learner.learn() for _ in range(arguments.small_steps)]
        before = learner.bits_per_byte()
        for kind, found in ends.items():
            larger = learner.grown(run, arguments.eval_tokens, to, kind, arguments.mode)
            scores, after = [larger.bits_per_byte()], []
            while len(after) < arguments.after:
                after += [larger.learn() for _ in range(min(arguments.every, arguments.after - len(after)))]
                scores.append(larger.bits_per_byte())
            found.append(scores[-1])
            rise = max(after[:10]) - statistics.mean(losses[-10:])
            later = ", ".join(f"{score:.4f}" for score in scores[1:])
            print(f"| {seed} | {kind} | {before:.4f} | {scores[0]:.4f} | {rise:+.3f} | {later} |", flush=True)
    gains = [reset - mapped for mapped, reset in zip(ends["map"], ends["reset"], strict=True)]
    print(f"\nreset - map after {arguments.after} steps: {spread(gains, '+.4f')} bits per byte")


def spread(values: list[float], shape: str) -> str:
    deviation = f" ± {statistics.stdev(values):{shape.lstrip('+')}}" if len(values) > 1 else ""
    return f"mean {statistics.mean(values):{shape}}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, small_steps in ((compute, 300), (moments, 200)):
        options = verbs.add_parser(verb.__name__)
        options.set_defaults(run_verb=verb)
        options.add_argument("run", type=Path)
        options.add_argument("--seeds", type=int, default=3)
        options.add_argument("--small", nargs="*", default=[], metavar="FIELD=N", help="of the run's first model")
        options.add_argument("--grow", nargs="*", default=GROWN, metavar="FIELD=N", help=f"default: {' '.join(GROWN)}")
        options.add_argument("--mode", choices=("immediate", "masked"), default="immediate")
        options.add_argument("--small-steps", type=int, default=small_steps, help="before growth")
        options.add_argument("--every", type=int, default=25, help="steps between looks at held-out text")
        options.add_argument("--eval-tokens", type=int, default=16384)
        if verb is compute:
            options.add_argument("--steps", type=int, default=350, help="of the large model from scratch")
            options.add_argument("--curves", type=Path, help="a JSON file for the points: tokens, FLOPs, bits per byte")
            options.add_argument("--picture", type=Path, help="an SVG file for them")
        else:
            options.add_argument("--after", type=int, default=60, help="steps after growth")
    options = verbs.add_parser("stream")
    options.set_defaults(run_verb=stream)
    options.add_argument(
        "--gigabytes", type=float, default=1.0, help="of the checkpoint; up to 4 times that is written"
    )
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", help="on the disk to measure; default: the system's temporary one")
    options.add_argument("--worker", choices=("make", "grow", "copy"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if getattr(arguments, "worker", None):
        work(arguments)
    else:
        arguments.run_verb(arguments)


if __name__ == "__main__":
    main()
