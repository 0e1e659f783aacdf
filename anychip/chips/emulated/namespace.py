"""`torch.emulated`: the functions that PyTorch and its users expect of a device's module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Device = torch.device | str | int | None


def _index(device: Device) -> int:
    """The number of a device; the current one's when it has none."""
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device):
        if device.type != "emulated":
            raise ValueError(f"expected an emulated device, got {device}")
        device = device.index
    return current_device() if device is None or device < 0 else device


def _device(device: Device) -> torch.device:
    return torch.device("emulated", _index(device))


# Devices


def init() -> None:
    """Nothing is left to be done."""


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return torch.ops.emulated.device_count()


def current_device() -> int:
    return torch.accelerator.current_device_index()


def set_device(device: Device) -> None:
    torch.accelerator.set_device_index(_index(device))


@contextmanager
def device(device: Device) -> Iterator[None]:
    """Make `device` the current one inside the block; None or a negative number changes nothing."""
    before = current_device()
    set_device(device)
    try:
        yield
    finally:
        set_device(before)


def get_device_name(device: Device = None) -> str:
    return "emulated accelerator"


@dataclass(frozen=True)
class DeviceProperties:
    name: str
    total_memory: int


def get_device_properties(device: Device = None) -> DeviceProperties:
    """`total_memory` in bytes: the limit, or 0 where the host's memory is the only one."""
    try:
        total = mem_get_info(device)[1]
    except NotImplementedError:
        total = 0
    return DeviceProperties(get_device_name(device), total)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def is_bf16_supported() -> bool:
    return True


# Streams and events: work is done when the call returns


Stream = torch.Stream  # both belong to the current accelerator unless told otherwise
Event = torch.Event


def current_stream(device: Device = None) -> torch.Stream:
    return torch.accelerator.current_stream(_device(device))


def default_stream(device: Device = None) -> torch.Stream:
    like = current_stream(device)
    return torch.Stream(stream_id=0, device_index=like.device_index, device_type=like.device_type)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Make `stream` the current one inside the block; None changes nothing."""
    if stream is None:
        yield
        return
    with stream:
        yield


def synchronize(device: Device = None) -> None:
    """Nothing is ever queued."""


# Random numbers


def _generator(device: Device) -> torch.Generator:
    return torch.ops.emulated.default_generator(_index(device))


def manual_seed(seed: int) -> None:
    _generator(None).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _generator(index).manual_seed(seed)


def seed() -> None:
    _generator(None).seed()


def seed_all() -> None:
    manual_seed_all(_generator(None).seed())


def initial_seed() -> int:
    return _generator(None).initial_seed()


def get_rng_state(device: Device = None) -> Tensor:
    """uint8[16] on the CPU: seed and offset."""
    return _generator(device).get_state()


def set_rng_state(new_state: Tensor, device: Device = None) -> None:
    _generator(device).set_state(new_state)


def get_rng_state_all() -> list[Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(new_states: list[Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


# Memory (bytes)


def memory_stats(device: Device = None) -> dict[str, Any]:
    return torch.accelerator.memory_stats(_index(device))


def memory_allocated(device: Device = None) -> int:
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Device = None) -> int:
    return torch.accelerator.max_memory_allocated(_index(device))


def memory_reserved(device: Device = None) -> int:
    return torch.accelerator.memory_reserved(_index(device))


def max_memory_reserved(device: Device = None) -> int:
    return torch.accelerator.max_memory_reserved(_index(device))


def reset_peak_memory_stats(device: Device = None) -> None:
    torch.accelerator.reset_peak_memory_stats(_index(device))


def reset_accumulated_memory_stats(device: Device = None) -> None:
    torch.accelerator.reset_accumulated_memory_stats(_index(device))


def empty_cache() -> None:
    torch.accelerator.empty_cache()


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """Free and total bytes. Raises NotImplementedError where no limit was set."""
    return torch.accelerator.get_memory_info(_index(device))


def host_view(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same memory: for kernels written here, never for training."""
    return torch.ops.emulated.host_view(tensor)


def autocast(*arguments: Any, **keywords: Any) -> AbstractContextManager[Any]:
    return torch.autocast("emulated", *arguments, **keywords)
