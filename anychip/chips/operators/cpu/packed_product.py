"""Products with bf16 matrices in csrc/packed_product.cpp's layout: read at the speed of memory for a few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.chips.operators.cpu.library import load

_PANEL = 64


class PackedProduct:
    """x [tokens, in] -> x @ weight.T + bias, all bf16, or the result in fp32 where it is `wide`; a copy of weight
    [out, in] and bias [out] is kept. `run` inputs are added up at a time, an even number; 0: all."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, wide: bool = False, run: int = 0) -> None:
        self._outputs, self._inputs = weight.shape
        self._odd = self._inputs % 2  # inputs are taken two at a time
        weight = F.pad(weight.detach(), (0, self._odd)).contiguous()
        panels = -(-self._outputs // _PANEL)
        self._packed = torch.empty(panels * _PANEL, weight.shape[1], dtype=torch.bfloat16)
        self._bias = None if bias is None else bias.detach().contiguous().clone()
        library = load()
        library.pack_weight(weight.data_ptr(), self._outputs, weight.shape[1], self._packed.data_ptr())
        self._run = library.packed_product_wide if wide else library.packed_product
        self._result = torch.float32 if wide else torch.bfloat16
        bias_place = None if self._bias is None else self._bias.data_ptr()
        self._fixed = weight.shape[1], run or weight.shape[1], self._packed.data_ptr(), bias_place

    def __call__(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1)) if self._odd else x.contiguous()
        y = x.new_empty(len(x), self._outputs, dtype=self._result)
        self._run(x.data_ptr(), len(x), *self._fixed, self._outputs, y.data_ptr())
        return y
