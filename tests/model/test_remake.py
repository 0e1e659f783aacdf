"""What backward computes again: the same gradients to the bit, with less kept in between."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe.schema import ModelConfig
from anychip.train.recompute import apply_recompute

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS = torch.arange(48).view(2, 24) % 64


def _decoder(dtype: torch.dtype, mode: str) -> Decoder:
    model = Decoder(CONFIG, dtype)
    init_parameters(model, CONFIG, 0)
    apply_recompute(model, mode)  # type: ignore[arg-type]
    return model


def _gradients(model: Decoder) -> dict[str, Tensor]:
    model(TOKENS).float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class _Storages(TorchDispatchMode):
    """Bytes of every storage that an operation made and that is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, besides: set[int]) -> int:
        gc.collect()
        found = [entry for key, entry in self._found.items() if key not in besides]
        return sum(nbytes for storage, nbytes in found if not storage.expired())


def _kept(model: Decoder) -> int:
    """Bytes that live between forward and backward, besides the parameters."""
    with _Storages() as storages:
        out = model(TOKENS)
        kept = storages.alive({parameter.untyped_storage()._cdata for parameter in model.parameters()})
    del out
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same_to_the_bit(dtype: torch.dtype, mode: str) -> None:
    expected, found = _gradients(_decoder(dtype, "none")), _gradients(_decoder(dtype, mode))
    assert (
        found.keys() == expected.keys() == {name for name, _ in Decoder(CONFIG).named_parameters()} - {"lm_head.weight"}
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_swiglu_are_not_kept(dtype: torch.dtype) -> None:
    cheap = TOKENS.numel() * dtype.itemsize * (2 * CONFIG.hidden_size + CONFIG.intermediate_size)
    none, selective = _kept(_decoder(dtype, "none")), _kept(_decoder(dtype, "selective"))
    assert none - selective == CONFIG.num_hidden_layers * cheap


def test_casts_of_the_masters_are_not_kept() -> None:
    """In bf16 all that is kept is half as large, but for a few fp32 numbers a row: no copy of a weight is there."""
    wide, narrow = _kept(_decoder(torch.float32, "none")), _kept(_decoder(torch.bfloat16, "none"))
    assert narrow < 0.6 * wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_recomputed_keeps_its_input_alone(dtype: torch.dtype) -> None:
    """Whatever is made again inside it."""
    state = TOKENS.numel() * CONFIG.hidden_size * dtype.itemsize
    tables = 2 * TOKENS.shape[1] * CONFIG.head_dim // 2 * 4
    few = TOKENS.numel() * 16  # ids, and what the last norm keeps of each row
    layers = CONFIG.num_hidden_layers
    assert _kept(_decoder(dtype, "full")) <= (layers + 3) * state + 2 * tables + few
    assert _kept(_decoder(dtype, "none")) > 2 * (layers + 3) * state


def test_a_second_backward_through_the_same_graph_gives_the_same() -> None:
    model = _decoder(torch.bfloat16, "selective")
    loss = model(TOKENS).float().square().sum()
    parameters = [p for name, p in model.named_parameters() if name != "lm_head.weight"]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters)))
