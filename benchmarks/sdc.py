"""Which check sees a flipped bit, by the bit's position: finite numbers, gradient norm, digests of copies, replay, and
the check of sums.

Two copies of a small model train in this process as two processes would: each takes its own micro-batch, gradients are
added (a sum of two is the same bits in either order), both update. In each trial one bit of the first copy turns over:
in a weight or a moment of the optimizer at a random step, or, within one step, in an activation, in the gradient that
flows back to it, or in a parameter's gradient; or in a gradient while it lies in memory until all are there, on its way
into the sum, or in the sum that one copy or both get. A flip that changes no bit of any gradient, or of any weight and
moment at the next comparison, has done nothing and does not count. Prints Markdown tables.

    python benchmarks/sdc.py --trials 20
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from anychip.data.batch import Batch
from anychip.model.init import init_tensor
from anychip.parallel.gradients import gradient_norm, scale_gradients
from anychip.parallel.layout import Layout
from anychip.parallel.processes import Processes
from anychip.recipe.schema import CheckpointConfig as Checkpoints
from anychip.recipe.schema import GuardConfig, LogConfig, ModelConfig, OptimizerConfig, ParallelConfig
from anychip.train.copies import digest
from anychip.train.engine import Engine
from anychip.train.guard import Guard
from anychip.train.job import TrainingJob
from anychip.train.optimizer import Optimizer
from anychip.train.prints import Print, Printer
from anychip.train.sums import SumCheck

INTERVAL = 10
HISTORY = 40
EXPLOSION = 5.0
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
CHECKS = ("finite", "norm", "digest", "replay", "sum")
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass
class Count:
    """Trials of one bit at one site: how many changed something, and of those, how many each check saw."""

    trials: int = 0
    changed: int = 0
    seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHECKS, 0))
    steps: list[int] = field(default_factory=list)


class Copy:
    """One copy of model and optimizer, with its micro-batches."""

    def __init__(self, dtype: torch.dtype) -> None:
        processes = Processes(ParallelConfig(), Layout(), 0, torch.device("cpu"))
        job = TrainingJob(
            title="sdc",
            directory=Path(tempfile.gettempdir()),
            model=MODEL,
            source=None,  # type: ignore[arg-type]
            initialize=lambda parameters: None,
            evaluate=None,
            identity="",
            steps=1,
            seq_length=32,
            micro_batch_size=2,
            global_batch_size=2,
            parallel=ParallelConfig(),
            optimizer=OptimizerConfig(),
            checkpoint=Checkpoints(),
            log=LogConfig(),
        )
        self.processes, self.engine = processes, Engine(job, processes, dtype)
        self.parameters = self.engine.parameters
        self.optimizer = Optimizer(self.parameters, job.optimizer, dtype)
        self.printer = Printer(self.engine, processes.device)
        self.sums = SumCheck(self.engine, processes)
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(init_tensor(name, parameter.shape, MODEL, 0))

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()} | self.optimizer.state()

    def fill(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def passes(self, batch: Batch) -> tuple[float, Print]:
        """Leaves the gradients of a micro-batch; its loss and their print."""
        for parameter in self.parameters.values():
            parameter.grad = None
        with self.printer.watch():
            loss = self.engine.forward_backward(batch)
        return float(loss), self.printer.take()

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.parameters.values() if p.grad is not None]

    def sketches(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack([self.sums.sketch(gradient) for gradient in gradients])

    def wrong_sum(self, computed: Tensor, gradients: list[Tensor], additions: int) -> bool:
        """Whether gradients are not what was computed, by their sketches."""
        parts = zip(computed, self.sketches(gradients), gradients, strict=True)
        return any(bool(self.sums.distance(was, now, gradient, additions) > 0) for was, now, gradient in parts)

    def update(self, gradients: list[Tensor], norm: float) -> None:
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient.clone()
        scale_gradients(self.parameters.values(), norm, 1.0)
        self.optimizer.step(3e-3)


def batch(step: int, copy: int) -> Batch:
    generator = torch.Generator().manual_seed(2 * step + copy)
    tokens = (torch.randint(0, 64, (2, 1), generator=generator) + torch.arange(33)) % 64
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def flip(tensor: Tensor, bit: int, chance: random.Random) -> None:
    """Turn over one bit of one element, in place."""
    flat = tensor.detach().view(-1)
    at = chance.randrange(len(flat))
    mask = 1 << bit if bit < 8 * flat.element_size() - 1 else -(1 << bit)
    flat[at : at + 1].view(WORDS[tensor.dtype]).bitwise_xor_(mask)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


class Pair:
    """Two copies in step, with the states and norms of a run without a fault."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.copies = (Copy(dtype), Copy(dtype))
        self.guard = Guard(GuardConfig(explosion=EXPLOSION))
        self.states: list[dict[str, Tensor]] = []
        for step in range(HISTORY + INTERVAL):
            if step >= HISTORY:
                self.states.append({name: tensor.clone() for name, tensor in self.copies[0].state().items()})
            assert not self.step(step, learn=step < HISTORY)

    def start(self, step: int) -> None:
        for copy in self.copies:
            copy.fill(self.states[step - HISTORY])

    def step(self, step: int, *, learn: bool = False) -> str:
        """Both compute, and update unless a check fails, whose name this returns."""
        return self.finish(sum(copy.passes(batch(step, at))[0] for at, copy in enumerate(self.copies)), learn=learn)

    def finish(self, loss: float, *, learn: bool = False) -> str:
        """The rest of a step whose gradients are there."""
        total = self.total()
        return self.apply(loss, total, total, learn=learn)

    def total(self) -> list[Tensor]:
        return [a + b for a, b in zip(*(copy.gradients() for copy in self.copies), strict=True)]

    def apply(self, loss: float, total: list[Tensor], other: list[Tensor], *, learn: bool = False) -> str:
        """What each copy does with the sum that it got."""
        first, second = self.copies
        for parameter, gradient in zip(first.parameters.values(), total, strict=True):
            parameter.grad = gradient
        norm = float(gradient_norm(first.parameters.values(), first.processes))
        problem = (self.guard.judge if learn else self.guard.problem)(loss, norm)
        if problem:
            return "norm" if "median" in problem else "finite"
        first.update(total, norm)
        second.update(other, norm)
        return ""

    def equal_digests(self) -> bool:
        one, other = ([int(digest(tensor)) for tensor in copy.state().values()] for copy in self.copies)
        return one == other


def in_a_step(pair: Pair, site: str, bit: int, count: Count, chance: random.Random) -> None:
    """A bit turns over while the first copy computes its micro-batch."""
    step = HISTORY + chance.randrange(INTERVAL)
    first, second = pair.copies
    pair.start(step)
    _, clean = second.passes(batch(step, 0))  # the replay, on the other copy
    expected = second.gradients()
    handle = _hook(first, site, bit, chance)
    loss, own = first.passes(batch(step, 0))
    handle()
    count.trials += 1
    if same_bits(first.gradients(), expected):
        return
    count.changed += 1
    count.seen["replay"] += bool(own.differing(clean, 0.0).any())
    other_loss, _ = second.passes(batch(step, 1))
    if check := pair.finish(loss + other_loss):
        count.seen[check] += 1
    count.seen["digest"] += not pair.equal_digests()


def _hook(copy: Copy, site: str, bit: int, chance: random.Random) -> Callable[[], None]:
    """Break one tensor of the next pass; returns what takes the hook off again."""
    if site == "gradient":
        parameter = chance.choice(list(copy.parameters.values()))

        def break_gradient(gradient: Tensor) -> Tensor:
            flip(broken := gradient.clone(), bit, chance)
            return broken

        return parameter.register_hook(break_gradient).remove
    layer = chance.choice(list(copy.engine.parts[0].layers))
    module = chance.choice([layer.self_attn.o_proj, layer.mlp.down_proj])

    def break_output(module: object, inputs: object, output: Tensor) -> None:
        if site == "activation":
            flip(output, bit, chance)
            return

        def break_backward(gradient: Tensor) -> Tensor:
            flip(broken := gradient.clone(), bit, chance)
            return broken

        output.register_hook(break_backward)

    return module.register_forward_hook(break_output).remove


def in_a_sum(pair: Pair, site: str, bit: int, count: Count, chance: random.Random) -> None:
    """A bit turns over between what backward computed and the update."""
    step = HISTORY + chance.randrange(INTERVAL)
    pair.start(step)
    loss = sum(copy.passes(batch(step, at))[0] for at, copy in enumerate(pair.copies))
    first, second = pair.copies
    own = first.sketches(first.gradients())
    computed, clean = own + second.sketches(second.gradients()), pair.total()
    if site in ("in memory", "on its way"):
        flip(chance.choice([p.grad for p in first.parameters.values() if p.grad is not None]), bit, chance)
    changed = site == "in memory" and first.wrong_sum(own, first.gradients(), 0)
    total = pair.total()
    if site in ("sum of one copy", "sum of all"):
        flip(chance.choice(total), bit, chance)
    count.trials += 1
    if same_bits(total, clean):
        return
    count.changed += 1
    count.seen["sum"] += changed or first.wrong_sum(computed, total, 1)
    if check := pair.apply(loss, total, clean if site == "sum of one copy" else total):
        count.seen[check] += 1
    count.seen["digest"] += not pair.equal_digests()


def in_a_large_sum(size: int, trials: int, chance: random.Random) -> list[Count]:
    """Flips in a sum of two matrices of normal numbers, [size, size]: rounding of more numbers hides more bits."""
    sums = Copy(torch.float32).sums
    sums.make_room(size * size)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(size, size, generator=generator) for _ in range(2))
    computed, total, counts = sums.sketch(one) + sums.sketch(other), one + other, [Count() for _ in range(32)]
    assert not sums.distance(computed, sums.sketch(total), total, 1)
    for bit, count in enumerate(counts):
        for _ in range(trials):
            flip(broken := total.clone(), bit, chance)
            count.trials, count.changed = count.trials + 1, count.changed + 1
            count.seen["sum"] += bool(sums.distance(computed, sums.sketch(broken), broken, 1) > 0)
            count.seen["finite"] += not bool(torch.isfinite(broken).all())
    return counts


def in_memory(pair: Pair, site: str, bit: int, count: Count, chance: random.Random) -> None:
    """A bit turns over in the first copy's memory between two steps; copies are compared after the last of ten."""
    at = HISTORY + chance.randrange(INTERVAL)
    first, second = pair.copies
    pair.start(at)
    kinds = {"weight": lambda n: "exp_avg" not in n and "step" not in n}
    wanted = kinds.get(site, lambda n: n.startswith(f"{site}."))
    flip(chance.choice([tensor for name, tensor in first.state().items() if wanted(name)]), bit, chance)
    count.trials += 1
    replayed = bool(first.passes(batch(at, 0))[1].differing(second.passes(batch(at, 0))[1], 0.0).any())
    checks = []
    for step in range(at, HISTORY + INTERVAL):
        checks.append(pair.step(step))
        if checks[-1]:  # nothing was updated, and copies are compared at once
            break
    if same_bits(*([t.clone() for t in copy.state().values()] for copy in pair.copies)):
        return
    count.changed += 1
    count.seen["digest"] += not pair.equal_digests()
    count.seen["replay"] += replayed
    if checks[-1]:
        count.seen[checks[-1]] += 1
    count.steps.append(len(checks))


def table(title: str, counts: list[Count]) -> None:
    """One row for neighbouring bits of which every check sees the same share."""
    print(f"\n**{title}**\n\n| bits | flips | changed something | {' | '.join(CHECKS)} | steps to digest |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[tuple[list[str], list[int]]] = []
    for bit, count in enumerate(counts):
        shares = [f"{seen / count.changed:.0%}" if count.changed else "-" for seen in count.seen.values()]
        if not rows or rows[-1][0] != shares:
            rows.append((shares, []))
        rows[-1][1].append(bit)
    for shares, bits in rows:
        here = [counts[bit] for bit in bits]
        steps = [step for count in here for step in count.steps]
        latency = f"{sum(steps) / len(steps):.1f}, at most {max(steps)}" if steps else "-"
        numbers = f"{bits[0]}-{bits[-1]}" if len(bits) > 1 else str(bits[0])
        changed = f"{sum(count.trials for count in here)} | {sum(count.changed for count in here)}"
        print(f"| {numbers} | {changed} | {' | '.join(shares)} | {latency} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="flips a bit of what is computed; a quarter in memory")
    parser.add_argument("--where", choices=("everywhere", "memory", "sum", "step"), default="everywhere")
    parser.add_argument("--large", type=int, default=2048, help="rows and columns of a large gradient")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    plans = [
        (torch.float32, 32, in_memory, ("weight", "exp_avg", "exp_avg_sq"), max(1, arguments.trials // 4)),
        (torch.float32, 32, in_a_sum, ("in memory", "on its way", "sum of one copy", "sum of all"), arguments.trials),
        (torch.float32, 32, in_a_step, ("gradient", "activation", "backward"), arguments.trials),
        (torch.bfloat16, 16, in_a_step, ("activation", "backward"), arguments.trials),
    ]
    wanted = {"memory": in_memory, "sum": in_a_sum, "step": in_a_step}.get(arguments.where)
    for dtype, bits, trial, sites, trials in plans:
        if wanted not in (None, trial):
            continue
        pair = Pair(dtype)
        for site in sites:
            counts = [Count() for _ in range(bits)]
            for bit, count in enumerate(counts):
                for _ in range(trials):
                    trial(pair, site, bit, count, chance)
            place = f"gradients, {site}" if trial is in_a_sum else site
            table(f"{place}, {str(dtype).removeprefix('torch.')} compute", counts)
    if wanted in (None, in_a_sum):
        size = arguments.large
        table(f"a sum of two matrices {size} x {size}", in_a_large_sum(size, arguments.trials, chance))


if __name__ == "__main__":
    main()
