"""One case on the chip: its results and gradients beside those in fp64 on the CPU, and its bits beside its own."""

from __future__ import annotations

import hashlib
import importlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from anychip.chips.operators import reference
from anychip.chips.operators.override import Override
from anychip.chips.operators.trial import Draw, moved, tensors_in, widened
from anychip.verify.probe.cases import Case
from anychip.verify.probe.judge import Flaw, flaw, limits

_REPEATS = 2
NOT_REPEATABLE = "gives other bits from run to run"
FLUSHES = "drops numbers below the smallest normal one"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which operator, in which version of it (vendor, reference, or the only one there is),
    in which result of which case, and how far it is off (shares of the norm)."""

    operator: str
    version: str
    what: str
    case: str
    kind: str
    measured: float = 0.0
    limit: float = 0.0

    def describe(self) -> str:
        numbers = f" (off by {self.measured:.2g}, allowed {self.limit:.2g})" if self.measured > 0 else ""
        version = {"vendor": " by the vendor", "reference": " in plain PyTorch"}.get(self.version, "")
        return f"{self.operator}{version}: {self.what} {self.kind}{numbers}; {self.case}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """What a case showed, and the digest of its bits (empty when it failed)."""

    findings: list[Finding]
    digest: str


def vendor_operator(override: Override) -> Callable[..., Any]:
    """A vendor's version, without the trial and the fall-back that guard it in training."""
    module = importlib.import_module(override.module)
    if missing := [name for name in override.functions if not hasattr(module, name)]:
        raise AttributeError(f"{override.module} has no {', '.join(missing)}")
    return override.build(module)


def measure(case: Case, version: str, device: torch.device, overrides: Mapping[str, Override]) -> Measurement:
    """Run a case in one version on a device. An exception is a finding too."""
    try:
        first = _call(case, version, device, overrides)
        findings = _wrong(case, version, first)
        if any(digest(_call(case, version, device, overrides)) != digest(first) for _ in range(_REPEATS)):
            findings.append(Finding(case.operator, version, "result", case.name, NOT_REPEATABLE))
        return Measurement(findings, digest(first))
    except Exception as error:  # whatever a vendor's library raises is what the probe is for
        last = (str(error).strip().splitlines() or [""])[0][:200]
        place = traceback.extract_tb(error.__traceback__)[-1].name
        kind = f"fails with {type(error).__name__} in {place}: {last}"
        return Measurement([Finding(case.operator, version, "call", case.name, kind)], "")


def bits(case: Case, version: str, device: torch.device, overrides: Mapping[str, Override]) -> str:
    """The digest of a case's bits alone; what it raises is said, so that it is like no digest."""
    try:
        return digest(_call(case, version, device, overrides))
    except Exception as error:
        return type(error).__name__


def _call(case: Case, version: str, device: torch.device, overrides: Mapping[str, Override]) -> dict[str, Tensor]:
    return observe(case, _function(case, version, overrides), moved(case.make(Draw()), device))


def _function(case: Case, version: str, overrides: Mapping[str, Override]) -> Callable[..., Any]:
    if case.function is not None:
        return case.function
    plain = getattr(reference, case.operator)
    return case.wrap(vendor_operator(overrides[case.operator]) if version == "vendor" else plain)


def _wrong(case: Case, version: str, found: dict[str, Tensor]) -> list[Finding]:
    expected = _expected(case)
    if case.exact:
        return _other_bits(case, version, found, expected)
    size = case.size(widened(case.make(Draw()))[0]) if case.size is not None else None
    findings = []
    for what, exact in expected.items():
        backward = what.startswith("gradient of") and case.differentiable
        allowed = limits(
            case.dtype,
            case.gradient_length if backward else case.length,
            case.gradient_roundings if backward else case.roundings,
        )
        one_factor = case.one_factor and not backward
        wrong = flaw(found[what], exact, allowed, None if backward else size, one_factor=one_factor)
        if wrong is not None:
            findings.append(_finding(case, version, what, wrong))
    return findings


def _expected(case: Case) -> dict[str, Tensor]:
    """In fp64 on the CPU; in its own dtype where bits are expected."""
    arguments = case.make(Draw())
    plain = case.function or case.wrap(getattr(reference, case.operator))
    return observe(case, plain, arguments if case.exact else widened(arguments))


def _other_bits(case: Case, version: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[Finding]:
    findings = []
    for what, right in expected.items():
        here = found[what].cpu()
        if torch.equal(here, right):
            continue
        off = (here.double() - right.double()).abs()
        below = right.abs().double() < torch.finfo(right.dtype).tiny
        if torch.equal(torch.where(below, 0.0, right.double()), torch.where(below, 0.0, here.double())):
            findings.append(_finding(case, version, what, Flaw(FLUSHES, 1.0, 0.0)))
            continue
        share = (here != right).double().mean().item()
        kind = "is not rounded to the nearest" if off.isfinite().all() else "has infinities in the wrong places"
        findings.append(_finding(case, version, what, Flaw(kind, share, 0.0)))
    return findings


def _finding(case: Case, version: str, what: str, wrong: Flaw) -> Finding:
    return Finding(case.operator, version, what, case.name, wrong.kind, wrong.measured, wrong.limit)


def observe(case: Case, function: Callable[..., Any], arguments: tuple[list[Any], dict[str, Any]]) -> dict[str, Tensor]:
    """Results and gradients of one call, by name."""
    args, keywords = arguments
    leaves = [args[position].requires_grad_() for position, _ in case.differentiable]
    with torch.set_grad_enabled(bool(leaves)):
        results = tensors_in(function(*args, **keywords))
    names = [*case.results, *(f"result {n}" for n in range(len(case.results), len(results)))]
    observed = {name: result.detach() for name, result in zip(names, results, strict=False)}
    if leaves:
        weights = Draw().normal(*results[0].shape, dtype=case.dtype).to(results[0])
        gradients = torch.autograd.grad(results[0], leaves, weights)
        observed.update({f"gradient of {name}": g for (_, name), g in zip(case.differentiable, gradients, strict=True)})
    return observed


def digest(observed: dict[str, Tensor]) -> str:
    """Of all bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(observed.items()):
        total.update(name.encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
