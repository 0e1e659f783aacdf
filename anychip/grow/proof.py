"""Are the logits what they were? Measured in fp64, fp32 and bf16, on random and real tokens, for the whole growth and
for each of its operators alone.

"exact" grows and computes in that precision, from the old weights: it shows whether the rules are right. "stored"
reads the grown weights as they lie in the checkpoint and shows what rounding left of it. A difference is relative to
the largest old logit. Tokens that only the new vocabulary has are not compared.

Where a model has experts, rounding may decide between two of nearly the same score, and what is computed is then
another function, as it would be on another chip. In fp32 and bf16 a sequence is compared up to the first token for
which it decided differently: nothing before it can see it. In fp64 all is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from anychip.errors import UnfitError
from anychip.grow.forward import Passed, Read, forward_by_layer
from anychip.grow.plan import GrowthPlan
from anychip.grow.rows import Rows
from anychip.grow.state import CastRows, grown_tensor
from anychip.model.arithmetic import parameter_shapes
from anychip.recipe.schema import ModelConfig

PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST = {"fp64": 1e-12, "fp32": 2e-5}
"""Largest relative difference of exact growth."""
RANDOM_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """One measurement; `of` is the whole growth or an operator, `weights` exact or stored, `compared` how many tokens
    were."""

    of: str
    weights: str
    precision: str
    tokens: str
    difference: float
    relative: float
    compared: int

    @property
    def passed(self) -> bool:
        return self.weights != "exact" or self.relative <= LARGEST.get(self.precision, float("inf"))


@dataclass(frozen=True)
class Proof:
    """What was measured; `preserving` is false for growth that changes the function by design (another rotary base)."""

    preserving: bool
    comparisons: list[Comparison]

    @property
    def passed(self) -> bool:
        return not self.preserving or all(found.passed for found in self.comparisons)

    def as_record(self) -> dict[str, Any]:
        found = [asdict(comparison) for comparison in self.comparisons]
        return {"preserving": self.preserving, "passed": self.passed, "limits": LARGEST, "comparisons": found}

    def sentence(self) -> str:
        """What was found, in words."""
        if not self.preserving:
            return "the rotary base changes, and with it the function; see the comparisons"
        found = ", ".join(f"{self.largest(precision):.1e} in {precision}" for precision in PRECISIONS)
        return f"logits differ by {found} of the largest"

    def largest(self, precision: str, weights: str = "exact") -> float:
        """The largest relative difference of the whole growth."""
        return max(
            found.relative
            for found in self.comparisons
            if (found.precision, found.weights, found.of) == (precision, weights, WHOLE)
        )


WHOLE = "all"


def prove(
    plan: GrowthPlan,
    old: Rows,
    stored: Rows | None = None,
    texts: Mapping[str, Tensor] | None = None,
    *,
    alone: bool = True,
) -> Proof:
    """Measure. `old` holds the old state, `stored` the grown one where it was written; `texts` are token sequences
    int64 [n] by name, beside a random one. With `alone` each operator is measured by itself, too."""
    chance = torch.Generator().manual_seed(plan.seed)
    sequences = {"random": torch.randint(0, plan.old.vocab_size, (_length(plan),), generator=chance)}
    sequences |= {name: tokens[: _length(plan)] for name, tokens in (texts or {}).items()}
    comparisons = []
    for precision, dtype in PRECISIONS.items():
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        rows = CastRows(old, kept)
        for name, tokens in sequences.items():
            before = forward_by_layer(plan.old, reader(plan.old, rows), tokens, dtype)

            def compare(of: str, weights: str, part: GrowthPlan, read: Read) -> Comparison:
                after = forward_by_layer(part.new, read, tokens, dtype)  # noqa: B023
                count = len(tokens) if precision == "fp64" else alike(part, before, after)  # noqa: B023
                was, found = before.logits[:count], after.logits[:count, : before.logits.shape[1]]  # noqa: B023
                difference = float((found - was).abs().max()) if count else 0.0
                relative = difference / max(float(before.logits.abs().max()), 1e-30)  # noqa: B023
                return Comparison(of, weights, precision, name, difference, relative, count)  # noqa: B023

            for of, part in _parts(plan, alone):
                comparisons.append(compare(of, "exact", part, grown_reader(part, rows)))
            if stored is not None:
                comparisons.append(compare(WHOLE, "stored", plan, reader(plan.new, CastRows(stored, kept))))
    return Proof(plan.old.rope_theta == plan.new.rope_theta, comparisons)


def alike(plan: GrowthPlan, before: Passed, after: Passed) -> int:
    """How many tokens from the first on have the experts that they had, in every layer that there was."""
    count = len(before.logits)
    kept = [choice for choice, new in zip(after.choices, plan.layers.inserted, strict=True) if not new]
    for old, new in zip(before.choices, kept, strict=True):
        if old is not None and new is not None:
            other = (old != new).any(-1).nonzero().flatten()
            count = min([count, *other[:1].tolist()])
    return count


def check(proof: Proof, where: object) -> None:
    """Raise UnfitError for a proof that failed."""
    if not proof.passed:
        worst = max((c for c in proof.comparisons if not c.passed), key=lambda c: c.relative)
        raise UnfitError(
            f"growth changed the logits: {worst.of} by {worst.relative:.3g} in {worst.precision} on {worst.tokens} "
            f"tokens, where {LARGEST[worst.precision]:g} is allowed.",
            where=where,
            do="The grown checkpoint is not published. Check that the old weights are finite.",
        )


def reader(config: ModelConfig, rows: Rows) -> Read:
    """Parameters of a model by name."""
    shapes = dict(parameter_shapes(config))
    return lambda name: rows.rows(f"model.{name}", torch.arange(shapes[name][0]))


def grown_reader(plan: GrowthPlan, old: Rows) -> Read:
    """Parameters of the grown model by name, grown when they are asked for."""
    shapes = dict(parameter_shapes(plan.new))
    return lambda name: grown_tensor(plan, "model", name, shapes[name], old)


def _parts(plan: GrowthPlan, alone: bool) -> Iterator[tuple[str, GrowthPlan]]:
    yield WHOLE, plan
    parts = list(plan.one_by_one()) if alone else []
    if len(parts) > 1:
        yield from parts


def _length(plan: GrowthPlan) -> int:
    return min(RANDOM_TOKENS, plan.old.max_position_embeddings)
