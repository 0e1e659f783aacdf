"""The whole probe: every case, several processes, the canary, a verdict. A probe that was stopped continues."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from anychip.chips.backend import Backend, detect_backend
from anychip.chips.emulated.faults.catalogue import VARIABLE as FAULTS
from anychip.chips.operators import operators_for
from anychip.chips.operators.override import Override
from anychip.chips.operators.registry import overrides_of
from anychip.chips.profile import ChipProfile
from anychip.files import sha256_json, write_json
from anychip.progress import progress
from anychip.recipe import Recipe
from anychip.train.precision import compute_dtype
from anychip.verify.probe.awkward import awkward_cases
from anychip.verify.probe.canary import run_canary
from anychip.verify.probe.cases import Case, ordinary_cases
from anychip.verify.probe.measure import Finding, measure
from anychip.verify.probe.shapes import Shapes, shapes_of
from anychip.verify.probe.verdict import Verdict, judge_chip
from anychip.verify.probe.worker import ProcessJob, groups_of, run_processes

_VERSION = 1


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found. `operators`: by operator, how many checks it took and what is wrong."""

    recipe: str
    vendor: str
    device: str
    torch: str
    shapes: str
    dtypes: list[str]
    checks: int
    seconds: float
    processes: str
    verdict: Verdict
    findings: list[Finding]
    operators: dict[str, int]
    canary: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        verdict = self.verdict
        lines = [f"{self.device} ({self.vendor}, PyTorch {self.torch}): {verdict.fitness} for {self.recipe}"]
        lines.append(f"  {self.checks} checks in {self.seconds:.0f} s: {', '.join(self.dtypes)}; {self.shapes}")
        lines.append(f"  processes: {self.processes}")
        lines += [f"  unfit: {reason}" for reason in verdict.reasons]
        lines += [f"  falls back to plain PyTorch: {reason}" for reason in verdict.fallbacks.values()]
        lines += [f"  note: {note}" for note in verdict.notes]
        return "\n".join(lines)

    def profile(self) -> ChipProfile:
        return ChipProfile(self.vendor, self.device, self.torch, self.verdict.fallbacks)


@dataclass
class _Progress:
    """Checks that ended, kept in a file as they end. Those of another chip, recipe or program are forgotten."""

    path: Path
    fingerprint: str
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, fingerprint: str, fresh: bool) -> _Progress:
        kept = cls(path, fingerprint)
        if path.is_file() and not fresh:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            try:
                if lines and json.loads(lines[0]) == {"fingerprint": fingerprint}:
                    kept.done = dict(json.loads(line) for line in lines[1:])
                    return kept
            except (ValueError, TypeError):  # the last line was being written, or the file is another's
                pass
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        return kept

    def keep(self, key: str, result: dict[str, Any]) -> dict[str, Any]:
        self.done[key] = result
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps([key, result]) + "\n")
        return result


def cases_of(
    shapes: Shapes, dtypes: list[torch.dtype], overrides: Mapping[str, Override], *, muon: bool
) -> Iterator[tuple[str, Case]]:
    """Every case in every version that there is of its operator."""
    for dtype in dtypes:
        for case in (*ordinary_cases(shapes, dtype, muon=muon), *awkward_cases(shapes, dtype)):
            if case.function is not None:
                yield "", case
                continue
            if case.operator in overrides:
                yield "vendor", case
            yield "reference", case


def probe(
    recipe: Recipe, folder: Path, *, fresh: bool = False, canary: bool = True, quiet: bool = False
) -> ProbeReport:
    """Probe the chip at hand for a recipe; what was done is kept in `folder`."""
    started = time.monotonic()
    backend = detect_backend()
    backend.prepare_process()
    device = backend.device(0)
    dtype = compute_dtype(recipe.training.compute_dtype, backend)
    dtypes = list(dict.fromkeys([dtype, torch.float32]))
    shapes, overrides = shapes_of(recipe), overrides_of(backend.vendor)
    name = _device_name(backend)
    fingerprint = sha256_json([_VERSION, backend.vendor, name, torch.__version__, recipe.model_dump(mode="json"),
                               os.environ.get(FAULTS, ""), torch.get_num_threads()])  # fmt: skip
    kept = _Progress.open(folder / "progress.jsonl", fingerprint, fresh)

    cases = list(cases_of(shapes, dtypes, overrides, muon=recipe.optimizer.name == "muon"))
    findings: list[Finding] = []
    digests: dict[str, str] = {}
    counts: dict[str, int] = {}
    with progress("probe", len(cases), "checks", quiet=quiet) as bar:
        for version, case in cases:
            key = f"{version} {case.name}"
            result = kept.done.get(key) or kept.keep(key, _measured(case, version, device, overrides))
            findings += [Finding(**found) for found in result["findings"]]
            digests[key] = "" if result["findings"] else result["digest"]
            counts[case.operator] = counts.get(case.operator, 0) + 1
            bar.advance()

    said, among = _several(recipe, backend, kept, folder, shapes, dtypes, digests)
    findings += among
    choices = {**dict.fromkeys((f.operator for f in findings if f.version == "vendor"), "reference")}
    found_canary = None
    if canary:
        key = f"canary {sorted(choices)}"
        found_canary = kept.done.get(key) or kept.keep(
            key, run_canary(device, dtype, operators_for(backend.vendor, choices)).as_json()
        )
    problem = found_canary["problem"] if found_canary else ""
    return ProbeReport(
        recipe=recipe.name,
        vendor=backend.vendor,
        device=name,
        torch=torch.__version__,
        shapes=shapes.describe(),
        dtypes=[str(d).removeprefix("torch.") for d in dtypes],
        checks=len(cases),
        seconds=time.monotonic() - started,
        processes=said,
        verdict=judge_chip(findings, problem, deterministic=recipe.training.deterministic),
        findings=findings,
        operators=counts,
        canary=found_canary,
    )


def write_results(report: ProbeReport, folder: Path) -> None:
    write_json(folder / "probe.json", report.as_json())


def _measured(case: Case, version: str, device: torch.device, overrides: Mapping[str, Override]) -> dict[str, Any]:
    measured = measure(case, version, device, overrides)
    return {"findings": [finding.as_json() for finding in measured.findings], "digest": measured.digest}


def _several(
    recipe: Recipe,
    backend: Backend,
    kept: _Progress,
    folder: Path,
    shapes: Shapes,
    dtypes: list[torch.dtype],
    digests: Mapping[str, str],
) -> tuple[str, list[Finding]]:
    """Findings of several processes, and in words which there were."""
    parallel = recipe.parallel
    degrees = {
        "pipeline": parallel.pipeline_parallel,
        "replicate": parallel.data_parallel_replicate or 1,
        "shard": parallel.data_parallel_shard,
        "context": parallel.context_parallel,
        "tensor": parallel.tensor_parallel,
    }
    on_cpu = backend.facts.device_type == "cpu"
    groups = groups_of(degrees, 4 if on_cpu else backend.device_count())
    if not groups:
        return "one device only: no collective was probed", []
    names = [str(d).removeprefix("torch.") for d in dtypes]
    job = ProcessJob(asdict(shapes), names, groups, degrees["pipeline"] > 1, torch.get_num_threads(), dict(digests))
    result = kept.done.get("processes") or kept.keep("processes", {"findings": run_processes(job, folder)})
    return f"{job.world_size}, groups over {', '.join(groups)}", [Finding(**found) for found in result["findings"]]


def _device_name(backend: Backend) -> str:
    if backend.facts.device_type == "cpu":
        from anychip.chips.cpu import cpu_model

        return cpu_model()
    return str(torch.get_device_module(backend.facts.device_type).get_device_properties(0).name)
