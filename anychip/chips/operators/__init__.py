"""Operators that vendors have kernels of their own for: one contract, a reference in plain PyTorch, overrides."""

from anychip.chips.operators.contract import Operators
from anychip.chips.operators.plain import reference

__all__ = ["Operators", "reference"]
