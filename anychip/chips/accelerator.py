"""Any accelerator through PyTorch's device-neutral API. A vendor is its facts plus what differs.

Where torch.accelerator cannot answer, as for devices whose allocator or streams are Python's, the device's own module
is asked.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from anychip.chips.facts import ErrorMeaning, Purpose, Setting, VendorFacts, collective_timeouts
from anychip.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MemoryStatistics:
    """Bytes of this process on its device. None: the device does not count them."""

    allocated: int | None
    reserved: int | None
    peak_allocated: int | None
    peak_reserved: int | None


class AcceleratorBackend:
    """A backend made of a vendor's facts. A third party subclasses this, sets `facts`, and overrides what differs."""

    facts: ClassVar[VendorFacts]

    @property
    def vendor(self) -> str:
        return self.facts.vendor

    @property
    def collective_backend(self) -> str:
        return self.facts.collectives.backend

    def load(self) -> None:
        """Import the plug-in, which may patch torch.distributed: do it before anything else takes references."""
        if self.facts.plug_in is None:
            return
        module = self.facts.plug_in.module
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise self._broken_plug_in(error) from None
            raise InputError(
                f"{module} is not installed.", where=f"chip {self.vendor}", do=f"Get it: {self.facts.plug_in.where}."
            ) from None
        except Exception as error:
            raise self._broken_plug_in(error) from None

    def device_count(self) -> int:
        self.load()
        import torch

        try:
            return int(torch.get_device_module(self.facts.device_type).device_count())
        except RuntimeError:  # torch does not know the device type
            return 0

    def device(self, local_rank: int | None = None) -> torch.device:
        """This process's device, made current: number `local_rank` of its node, LOCAL_RANK when None."""
        import torch

        index = int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank
        count = self.device_count()
        if index >= count:
            variable = self.facts.visible_devices
            hint = f" {variable} is {os.environ[variable]!r}." if variable and variable in os.environ else ""
            raise InputError(
                f"process {index} of this node needs device {self.facts.device_type}:{index}, but {count} "
                f"{'is' if count == 1 else 'are'} visible.{hint}",
                where=f"chip {self.vendor}",
                do="Start one process a visible device; `anychip doctor` lists them.",
            )
        device = torch.device(self.facts.device_type, index)
        torch.get_device_module(device).set_device(index)
        return device

    def multiplies_bf16(self) -> bool:
        """As the device's module says; emulated bf16 does not count."""
        import torch

        supported = getattr(torch.get_device_module(self.facts.device_type), "is_bf16_supported", None)
        if supported is None:
            return False
        try:
            return bool(supported(including_emulation=False))
        except TypeError:
            return bool(supported())

    def memory(self) -> MemoryStatistics:
        return MemoryStatistics(
            self._count("memory_allocated"),
            self._count("memory_reserved"),
            self._count("max_memory_allocated"),
            self._count("max_memory_reserved"),
        )

    def peak_memory_bytes(self) -> int:
        """What the process took from the device at most, its allocator's reserve included where that is counted."""
        memory = self.memory()
        return memory.peak_reserved or memory.peak_allocated or 0

    def synchronize(self) -> None:
        import torch

        try:
            torch.accelerator.synchronize()
        except RuntimeError:  # not offered for this device, or a real failure, which the module reports again
            torch.get_device_module(self.facts.device_type).synchronize()

    def prepare_process(self) -> None:
        """Set the variables that a run needs and the user has not set. Some are read when the plug-in loads: a
        launcher should set them before the process starts, and `anychip doctor` says which are missing."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        for setting in self.environment(world_size):
            os.environ.setdefault(setting.name, setting.value)

    def set_deterministic(self, enabled: bool) -> None:
        """Before the first operator, once: some runtimes ignore a later change."""
        import torch

        if enabled:
            for setting in self.environment(1, "deterministic"):
                os.environ.setdefault(setting.name, setting.value)
        # What use_deterministic_algorithms does, without its import of the compiler, which takes a second.
        torch.set_deterministic_debug_mode("error" if enabled else "default")

    def environment(self, world_size: int, *purposes: Purpose) -> list[Setting]:
        """Variables to set for a job of so many processes; those of purpose `run` when none is named."""
        return self.facts.environment(world_size, *purposes)

    def collective_timeout(self, world_size: int) -> timedelta:
        """What init_process_group should be given."""
        return timedelta(seconds=collective_timeouts(world_size).group)

    def explain_error(self, text: str) -> ErrorMeaning | None:
        return self.facts.explain_error(text)

    def _broken_plug_in(self, error: Exception) -> InputError:
        meaning = self.explain_error(str(error))
        return InputError(
            f"the plug-in cannot be imported ({(str(error).strip() or type(error).__name__).splitlines()[0]}).",
            where=f"chip {self.vendor}",
            do=meaning.do if meaning else "Install its libraries; `anychip doctor` shows the versions that are here.",
        )

    def _count(self, name: str) -> int | None:
        import torch

        for source in (torch.accelerator, torch.get_device_module(self.facts.device_type)):
            function: Any = getattr(source, name, None)
            try:
                return int(function()) if function is not None else None
            except RuntimeError:
                continue
        return None
