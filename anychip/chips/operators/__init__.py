"""Operators that vendors have kernels of their own for: one contract, a reference in plain PyTorch, overrides."""

from anychip.chips.operators.contract import Operators
from anychip.chips.operators.override import OperatorFallback, Override
from anychip.chips.operators.plain import reference
from anychip.chips.operators.registry import operators_for

__all__ = ["OperatorFallback", "Operators", "Override", "operators_for", "reference"]
