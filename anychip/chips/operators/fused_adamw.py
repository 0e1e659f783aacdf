"""PyTorch's fused AdamW, for chips whose plug-in registers aten::_fused_adamw_. Not run on hardware other than CPUs."""

from __future__ import annotations

from anychip.chips.operators.override import Override
from anychip.chips.operators.plain import fused_adamw

FUSED_ADAMW = Override("torch", ("_fused_adamw_",), lambda torch: fused_adamw)
