"""A vendor's own version of an operator, and when it is called.

The first call of each kind (dtype, head_dim, causal, masked, ...) tries the vendor's function on small random inputs,
forward and backward, against the reference on the CPU in fp64. A module or a function that is missing, an error and a
wrong result all end the same way: one warning, and the reference from then on.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Thread
from types import ModuleType
from typing import Any

import torch

from anychip.chips.operators.trial import TRIALS, Trial, disagreement


@dataclass(frozen=True)
class Override:
    """How to get a vendor's version of an operator."""

    module: str  # imported at the operator's first call, not before
    functions: tuple[str, ...]  # names that it must have
    build: Callable[[ModuleType], Callable[..., Any]]  # from the module, a function that keeps the operator's contract
    traceable: bool = False  # whether code being compiled may hold it


class OperatorFallback(RuntimeWarning):
    """An operator runs as plain PyTorch, because the vendor's own version is missing or wrong."""


class CheckedOperator:
    """The vendor's function where a trial proved it right, else the reference.

    Tensors without memory (meta device) get the reference. So does code being compiled, unless the vendor's function
    can be traced and was proved by a call before.
    """

    def __init__(self, name: str, override: Override, reference: Callable[..., Any]) -> None:
        self._name, self._override, self._reference = name, override, reference
        self._function: Callable[..., Any] | None = None
        self._proved: set[Hashable] = set()
        self.fallback_reason: str | None = None

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if self.fallback_reason is not None:
            return self._reference(*args, **keywords)
        if torch.compiler.is_compiling():
            usable = self._function if self._override.traceable and self._proved else None
            return (usable or self._reference)(*args, **keywords)
        trial = TRIALS[self._name](*args, **keywords)
        if trial.device.type == "meta":
            return self._reference(*args, **keywords)
        if trial not in self._proved:
            self.fallback_reason = self._load() or self._try(trial)
            if self.fallback_reason is not None:
                message = (
                    f"operator {self._name} runs as plain PyTorch instead of by {self._override.module}: "
                    f"{self.fallback_reason}"
                )
                warnings.warn(message, OperatorFallback, stacklevel=2)
                return self._reference(*args, **keywords)
            self._proved.add(trial)
        assert self._function is not None
        return self._function(*args, **keywords)

    def _load(self) -> str | None:
        """Import the vendor's module once; returns why it is of no use, if so."""
        if self._function is not None:
            return None
        try:
            module = importlib.import_module(self._override.module)
        except (ImportError, OSError, RuntimeError) as error:
            return f"the module cannot be imported ({_first_line(error)})"
        if missing := [name for name in self._override.functions if not hasattr(module, name)]:
            return f"the module has no {', '.join(missing)}"
        self._function = self._override.build(module)
        return None

    def _try(self, trial: Trial) -> str | None:
        """Run a trial in a thread of its own: recomputation, gradient modes and dispatch modes of the caller are a
        matter of its thread and must neither see the trial nor change it."""
        found: list[str | None] = []
        assert self._function is not None
        function, reference = self._function, self._reference

        def run() -> None:
            try:
                if trial.device.type != "cpu" and trial.device.index is not None:
                    torch.accelerator.set_device_index(trial.device.index)
                found.append(disagreement(self._name, trial, function, reference))
            except Exception as error:  # whatever a vendor's library raises, the reference can take over
                found.append(f"{type(error).__name__} in the first call: {_first_line(error)}")

        thread = Thread(target=run, name=f"trial of {self._name}")
        thread.start()
        thread.join()
        return found[0]


def is_right(what: str, difference: Callable[[], float], limit: float) -> bool:
    """Whether a kernel that is called directly, without an operator's trials, differs by no more than `limit` in a try
    of its own; one warning where it fails."""
    try:
        found = difference()
        if found <= limit:  # false for NaN
            return True
        reason = f"its result differs from the reference by {found:.2g} of its norm"
    except (OSError, RuntimeError) as error:
        reason = _first_line(error)
    warnings.warn(f"{what} as plain PyTorch: {reason}", OperatorFallback, stacklevel=4)
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
