"""`anychip doctor`: what is installed and detected here, what does not fit together, and how to mend it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

from anychip.chips.detect import CHOICE, known_backends, load_backend
from anychip.chips.facts import DeviceHealth, PlugIn, VendorFacts
from anychip.chips.probe import AUTOLOAD, probe
from anychip.errors import AnychipError

_TOOL_SECONDS = 30
_LARGEST_PRODUCT_ERROR = 5e-3  # fp32 that a chip computes by tf32 or similar is within this


@dataclass(frozen=True)
class Finding:
    """fault: training would fail or be wrong here (exit code 3); advice: it would run."""

    level: Literal["fault", "advice"]
    what: str
    do: str


@dataclass
class Report:
    vendor: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    health: list[DeviceHealth] = field(default_factory=list)
    environment: list[dict[str, str | None]] = field(default_factory=list)  # variables that differ from our advice
    findings: list[Finding] = field(default_factory=list)

    @property
    def fit(self) -> bool:
        return not any(finding.level == "fault" for finding in self.findings)

    def fault(self, what: str, do: str) -> None:
        self.findings.append(Finding("fault", what, do))

    def advise(self, what: str, do: str) -> None:
        self.findings.append(Finding("advice", what, do))

    def as_json(self) -> dict[str, Any]:
        return {"fit": self.fit, **asdict(self)}

    def as_text(self) -> str:
        lines = [f"{name:<12} {value or 'unknown'}" for name, value in self.versions.items()]
        lines.append(f"{'chip':<12} {self.vendor or 'unknown'}")
        lines += [f"{'device ' + str(n):<12} {device['name']}" for n, device in enumerate(self.devices)]
        lines += [f"{'health ' + h.device:<12} {_health_text(h)}" for h in self.health]
        for title, level in (("Faults", "fault"), ("Advice", "advice")):
            found = [finding for finding in self.findings if finding.level == level]
            lines += ["", f"{title}:"] if found else []
            lines += [f"- {finding.what}\n  {finding.do}" for finding in found]
        if self.environment:
            lines += ["", "Environment (training sets what is unset; what is read at start a launcher must set):"]
            lines += [
                f"  export {v['name']}={v['advised']}  # {_instead_of(v['now'])}{v['why']}" for v in self.environment
            ]
        return "\n".join([*lines, "", "Fit to train." if self.fit else "Not fit to train as it is."])


def examine() -> Report:
    """Look at this machine. Takes seconds: torch is imported in a child process, vendors' tools are run."""
    report = Report(versions={"python": platform.python_version()})
    try:
        vendors = [load_backend(name).facts for name in known_backends() if name not in ("cpu", "emulated")]
    except AnychipError as error:
        report.fault(error.paragraph, "Remove the package that provides it.")
        vendors = []
    seen = probe()
    explained = None
    if "error" in seen:
        explained = _explain_failed_import(report, seen["error"], vendors)
        seen = probe(autoload=False)
    _read_versions(report, seen, vendors)
    _judge_detection(report, seen, vendors, explained)
    facts = next((facts for facts in vendors if facts.vendor == report.vendor), None)
    if facts is not None:
        _judge_environment(report, facts)
        _judge_health(report, facts)
    return report


def matching_torch(plug_in_version: str) -> str:
    """The torch release, as major.minor, that a plug-in's version names: after +torch, else by its own number."""
    named = re.search(r"\+torch(\d+\.\d+)", plug_in_version)
    return named.group(1) if named else ".".join(plug_in_version.split(".")[:2])


def _explain_failed_import(report: Report, error: str, vendors: list[VendorFacts]) -> str | None:
    """Say why `import torch` fails; the plug-in that is the cause, if one is."""
    named = re.search(r"Failed to load the backend extension: (\w+)", error)
    if not named:
        report.fault(f"`import torch` fails: {_last_line(error)}", "Install torch again in this environment.")
        return None
    module = named.group(1)
    causes = re.findall(r"^(?:ImportError|OSError|ModuleNotFoundError): (.+)$", error, re.MULTILINE)
    report.fault(
        f"`import torch` fails because it loads the plug-in {module}, which fails: "
        f"{causes[0] if causes else 'no reason'}.",
        f"{_remedy(module, error, vendors)} Until then {AUTOLOAD}=0 lets torch start without it.",
    )
    return module


def _remedy(module: str, error: str, vendors: list[VendorFacts]) -> str:
    owners = [facts for facts in vendors if facts.plug_in and facts.plug_in.module == module]
    meaning = owners[0].explain_error(error) if owners else None
    return meaning.do if meaning else f"Install the libraries that {module} needs, or uninstall it."


def _read_versions(report: Report, seen: dict[str, Any], vendors: list[VendorFacts]) -> None:
    report.versions["torch"] = seen.get("torch") or _installed("torch")
    for key in ("cuda", "hip"):
        if seen.get(key):
            report.versions[key] = seen[key]
    for plug_in in (facts.plug_in for facts in vendors if facts.plug_in):
        if find_spec(plug_in.module):
            report.versions[plug_in.module] = _installed(plug_in.distribution)
            _judge_plug_in(report, plug_in, report.versions["torch"])


def _judge_plug_in(report: Report, plug_in: PlugIn, torch_version: str | None) -> None:
    found = report.versions[plug_in.module]
    if found and torch_version and matching_torch(found) != matching_torch(torch_version):
        report.fault(
            f"{plug_in.module} {found} is made for torch {matching_torch(found)}, but torch {torch_version} is here.",
            f"Install both of one release ({plug_in.where}).",
        )


def _judge_detection(report: Report, seen: dict[str, Any], vendors: list[VendorFacts], explained: str | None) -> None:
    report.vendor = seen.get("vendor")
    report.devices = seen.get("devices", [])
    failures = seen.get("failures", {})
    for module, reason in failures.items():
        if module != explained:
            report.fault(f"The plug-in {module} does not work: {reason}.", _remedy(module, reason, vendors))
    if "refused" in seen and not failures:
        report.fault(**seen["refused"])
    if "failed" in seen:
        report.fault(f"The device cannot be used: {seen['failed']}", "Check the driver with the vendor's tool.")
    if seen.get("collectives") is False:
        report.fault("torch.distributed does not know this chip's collectives.", "Install the vendor's own build.")
    wrong = seen.get("product_error")
    if wrong is not None and not wrong <= _LARGEST_PRODUCT_ERROR:
        report.fault(f"A product on the device differs from the CPU's by {wrong:.1e}.", "Do not train on this device.")
    if report.vendor == "cpu" and seen.get("chosen") != "cpu":
        _judge_unused_tools(report, vendors)


def _judge_unused_tools(report: Report, vendors: list[VendorFacts]) -> None:
    """A vendor's driver is here, but its torch is not: the chip would stay idle."""
    for facts in vendors:
        tool = next((tool for tool in facts.tools if shutil.which(tool)), None)
        if tool is None or any(shutil.which(absent) for absent in facts.absent_tools):
            continue
        where = facts.plug_in.where if facts.plug_in else "the vendor's build of torch"
        report.fault(
            f"{tool} is here, so this machine may have a {facts.maker} chip, but torch drives none.",
            f"Install {facts.plug_in.module + ' (' + where + ')' if facts.plug_in else where}; {CHOICE}=cpu if the CPU "
            "is meant.",
        )


def _judge_environment(report: Report, facts: VendorFacts) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    for setting in facts.environment(world_size):
        now = os.environ.get(setting.name)
        if now != setting.value:
            report.environment.append({"name": setting.name, "now": now, "advised": setting.value, "why": setting.why})


def _judge_health(report: Report, facts: VendorFacts) -> None:
    if facts.health is None or shutil.which(facts.health.command[0]) is None:
        report.advise(f"The health of {facts.vendor} devices cannot be read here.", "Install the vendor's tool.")
        return
    try:
        done = subprocess.run(
            facts.health.command, capture_output=True, text=True, errors="replace", timeout=_TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        report.fault(
            f"{facts.health.command[0]} does not answer ({error}).", "Check the driver; a device may be stuck."
        )
        return
    driver = (
        re.search(facts.health.version, done.stdout, re.MULTILINE | re.IGNORECASE) if facts.health.version else None
    )
    report.versions["driver"] = driver.group(1) if driver else None
    report.health = facts.health.parse(done.stdout)
    if not report.health:
        report.advise(
            f"The output of `{' '.join(facts.health.command)}` lists no device that we can read "
            f"(exit code {done.returncode}).",
            "Run it and look; this release of the tool may print otherwise.",
        )
    for device in report.health:
        if device.healthy is False:
            report.fault(f"Device {device.device} is sick: {'; '.join(device.problems)}.", "Take it out of service.")


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _health_text(health: DeviceHealth) -> str:
    state = {True: "ok", False: "SICK", None: "health not told"}[health.healthy]
    readings = [
        f"{value:g} {unit}"
        for value, unit in ((health.temperature_c, "C"), (health.power_watts, "W"))
        if value is not None
    ]
    if health.memory_used_mib is not None and health.memory_total_mib is not None:
        readings.append(f"{health.memory_used_mib:g}/{health.memory_total_mib:g} MiB")
    return ", ".join([state, *readings])


def _instead_of(now: str | None) -> str:
    return "" if now is None else f"Now {now}. "


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else text
