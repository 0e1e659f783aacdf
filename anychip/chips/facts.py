"""What is said of a vendor's software as data: names, variables, error codes, what its collectives refuse.

Needs no torch, so that `launch` can write an environment on a machine without the vendor's software.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

REDUCE_OPS = ("SUM", "PRODUCT", "MIN", "MAX", "AVG", "PREMUL_SUM", "BAND", "BOR", "BXOR")
Purpose = Literal["run", "deterministic", "canary", "debug", "tune"]


@dataclass(frozen=True)
class PlugIn:
    """The module that teaches PyTorch the device type."""

    module: str
    distribution: str  # its name for importlib.metadata
    autoload: bool  # whether `import torch` imports it, through an entry point of group torch.backends
    where: str  # where a user gets it


@dataclass(frozen=True)
class Setting:
    """An environment variable, the value we advise, and why.

    run: for every training; deterministic: only for bitwise repetition; canary: for tests that must not pass by
    accident; debug: for finding a failing operator, slow; tune: worth a try, its effect depends on the job.
    """

    name: str
    value: str
    why: str
    purpose: Purpose = "run"


@dataclass(frozen=True)
class Timeouts:
    """Seconds. `connect`: making a communicator. `execute`: one collective. `event`: waiting for a device event.
    `group`: what init_process_group is given; the largest, so that the inner message appears first."""

    connect: int
    execute: int
    event: int
    group: int


def collective_timeouts(world_size: int) -> Timeouts:
    """Advice for so many processes. The growth with their number is our rule of thumb, not a vendor's figure: a minute
    more for each 512 processes that must find each other, and half an hour for a slow save or a straggler."""
    connect = 300 + 60 * (world_size // 512)
    execute = 1800
    event = execute + 120
    return Timeouts(connect, execute, event, max(connect, event) + 120)


@dataclass(frozen=True)
class TimeoutVariable:
    """An environment variable that carries one of the Timeouts in seconds."""

    name: str
    of: Literal["connect", "execute", "event", "group"]
    why: str


@dataclass(frozen=True)
class Collectives:
    """The vendor's collective library, by its limits. Names are those of torch.distributed.ReduceOp and of dtypes."""

    backend: str  # name for init_process_group
    library: str = ""
    refused_ops: frozenset[str] = frozenset()
    emulated_ops: Mapping[str, str] = field(default_factory=dict)  # op -> what really happens
    refused_dtypes: frozenset[str] = frozenset()  # for reductions
    altered_dtypes: Mapping[str, str] = field(default_factory=dict)  # dtype -> what is really computed
    notes: str = ""

    def reduces(self, op: str, dtype: str) -> bool:
        """Whether a reduction does exactly what it says, rather than fail or compute something else."""
        ops = self.refused_ops.union(self.emulated_ops)
        return op not in ops and dtype not in self.refused_dtypes.union(self.altered_dtypes)


@dataclass(frozen=True)
class DeviceName:
    """What a scheduler calls some of a vendor's chips."""

    chip: str  # regular expression for the chip's id in the catalogue
    resource: str  # Kubernetes resource, as the vendor's device plug-in registers it
    operator_label: str = ""  # value by which the vendor's own job operator knows the chip


@dataclass(frozen=True)
class Scheduling:
    """What schedulers need to know of a vendor. Read in the sources of its device plug-in and job operator."""

    devices: tuple[DeviceName, ...] = ()
    interface_variables: tuple[str, ...] = ()  # bind the collective library's control connections to an interface
    pod_fields: Mapping[str, str] = field(default_factory=dict)  # variable -> field of the Pod, for gang schedulers
    host_paths: tuple[str, ...] = ()  # folders of the node that a container needs

    def device(self, chip_id: str) -> DeviceName | None:
        """The first name that fits a chip; None: not known to us."""
        return next((name for name in self.devices if re.search(name.chip, chip_id)), None)


@dataclass(frozen=True)
class ErrorMeaning:
    """What a text or code in an error means. `broken_hardware`: take the device out of service, do not just restart."""

    pattern: str  # regular expression, case is ignored
    meaning: str
    broken_hardware: bool
    do: str

    def matches(self, text: str) -> bool:
        return re.search(self.pattern, text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class DeviceHealth:
    """One device as the vendor's tool sees it. None: the tool does not say."""

    device: str
    name: str = ""
    healthy: bool | None = None
    problems: tuple[str, ...] = ()
    temperature_c: float | None = None
    power_watts: float | None = None
    memory_used_mib: float | None = None
    memory_total_mib: float | None = None


@dataclass(frozen=True)
class HealthCommand:
    """The vendor's tool, and how its output is read. `parse` never raises: what it cannot read, it leaves out."""

    command: tuple[str, ...]
    parse: Callable[[str], list[DeviceHealth]]
    version: str = ""  # regular expression: group 1 is the driver's version in the same output


@dataclass(frozen=True)
class VendorFacts:
    """A vendor's stack. Everything but the first three fields may stay unknown."""

    vendor: str
    device_type: str
    collectives: Collectives
    maker: str = ""
    plug_in: PlugIn | None = None  # None: the vendor's own build of torch has the device built in
    visible_devices: str | None = None  # variable that hides devices from a process
    device_name: str = ""  # regular expression for the name that torch gives the device
    hip: bool = False  # torch.version.hip is set
    tools: tuple[str, ...] = ()  # commands whose presence shows the vendor's driver
    absent_tools: tuple[str, ...] = ()  # commands whose presence says that the tools above are another vendor's
    marker_variable: str | None = None  # environment variable that is 1 where the stack is in use
    settings: tuple[Setting, ...] = ()
    timeouts: tuple[TimeoutVariable, ...] = ()
    health: HealthCommand | None = None
    errors: tuple[ErrorMeaning, ...] = ()
    scheduling: Scheduling = Scheduling()
    deterministic_notes: str = ""
    notes: str = ""

    def environment(self, world_size: int, *purposes: Purpose) -> list[Setting]:
        """Variables to set before a process starts; `run` ones when no purpose is named."""
        wanted = purposes or ("run",)
        seconds = collective_timeouts(world_size)
        found = [Setting(v.name, str(getattr(seconds, v.of)), v.why) for v in self.timeouts if "run" in wanted]
        return found + [setting for setting in self.settings if setting.purpose in wanted]

    def explain_error(self, text: str) -> ErrorMeaning | None:
        """The first known meaning that the text of an error matches."""
        return next((error for error in (*self.errors, *COMMON_ERRORS) if error.matches(text)), None)


OUT_OF_SERVICE = "Take the device out of service; the run continues from its checkpoint on other nodes."
FIRST_RANK = "Look for the first rank that stopped: this is its consequence."
COMMON_ERRORS = (
    ErrorMeaning(
        r"out of memory|OutOfMemoryError",
        "the device has not enough memory for this step",
        False,
        "Lower training.micro_batch_size or split the model further; another process may hold memory too.",
    ),
    ErrorMeaning(
        r"connection (refused|reset|closed)|broken pipe|socket timeout",
        "another process went away or cannot be reached",
        False,
        FIRST_RANK,
    ),
)
