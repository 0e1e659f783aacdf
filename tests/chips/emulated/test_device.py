"""The device computes what the CPU computes, in memory of its own account, and keeps apart from the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device_process import needs_device, on_device
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = needs_device


def _train(device: str, dtype: torch.dtype, fused: bool) -> list[str]:
    """Losses and the norm of the weights, exactly, of a few steps of a small decoder."""
    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.recipe.schema import ModelConfig

    config = ModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = Decoder(config, dtype)
    init_parameters(model, config, 1)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused, foreach=not fused)
    ids = torch.randint(0, 96, (2, 25), generator=torch.Generator().manual_seed(0)).to(device)
    seen = []
    for _ in range(4):
        hidden = checkpoint(model, ids[:, :-1], use_reentrant=False)
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        seen += [loss.item().hex(), norm.item().hex()]
    return seen + [parameter.detach().float().norm().item().hex() for parameter in model.parameters()]


def _train_both() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for fused in (True, False):
            assert _train("emulated", dtype, fused) == _train("cpu", dtype, fused), (dtype, fused)


def test_training_gives_the_cpus_numbers_to_the_last_bit(tmp_path: Path) -> None:
    on_device(_train_both, tmp_path)


def _attention(device: str, **how: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 33, 16, generator=generator).to(device).requires_grad_() for heads in (4, 2, 2))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
    out.square().sum().backward()
    return [x.detach().cpu() for x in (out, q.grad, k.grad, v.grad) if x is not None]


def _compare_attention() -> None:
    mask = torch.ones(33, 33, dtype=torch.bool).tril(2)
    for how in ({"is_causal": True}, {"scale": 0.3}):
        for found, expected in zip(_attention("emulated", **how), _attention("cpu", **how), strict=True):
            assert torch.equal(found, expected)
    on_cpu, there = _attention("cpu", attn_mask=mask), _attention("emulated", attn_mask=mask.to("emulated"))
    assert all(torch.equal(a, b) for a, b in zip(on_cpu, there, strict=True))


def test_attention_takes_the_cpus_kernel_with_shared_key_heads(tmp_path: Path) -> None:
    on_device(_compare_attention, tmp_path)


def _views() -> None:
    base = torch.arange(12.0, device="emulated")
    grid = base.view(3, 4)
    grid.t()[1] = -1
    grid[2:].mul_(10)
    assert base.tolist() == [0, -1, 2, 3, 4, -1, 6, 7, 80, -10, 100, 110]
    assert torch.as_strided(base, (2, 2), (4, 1), 2).tolist() == [[2, 3], [6, 7]]
    assert base.unfold(0, 4, 4).data_ptr() == base.data_ptr()
    assert grid.view(torch.int32).data_ptr() == base.data_ptr()

    out = torch.empty(0, device="emulated")
    torch.mm(grid, grid.t(), out=out)  # grows `out`
    assert torch.equal(out.cpu(), grid.cpu() @ grid.cpu().t())

    whole = torch.ones(8, device="emulated")
    part, storage = whole[2:4], whole.untyped_storage()
    storage.resize_(0)  # as sharded training frees gathered parameters
    storage.resize_(32)
    whole.fill_(3.0)
    assert part.tolist() == [3.0, 3.0]
    other = torch.empty(0, device="emulated").set_(whole.untyped_storage(), 1, (3,), (2,))
    assert other.tolist() == [3.0, 3.0, 3.0]
    whole.resize_(20)
    assert whole.shape == (20,)
    assert whole[:8].tolist() == [3.0] * 8

    leaf = torch.ones(3, device="emulated", requires_grad=True)
    view = leaf * 1
    view[0:1].mul_(5)  # autograd follows writes through views
    view.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [5, 1, 1]


def test_views_share_memory_and_storages_can_be_resized(tmp_path: Path) -> None:
    on_device(_views, tmp_path)


def _memory() -> None:
    torch.emulated.reset_peak_memory_stats()  # type: ignore[attr-defined]
    before = torch.accelerator.memory_allocated()
    x = torch.zeros(1000, device="emulated")
    y = x + 1
    z = torch.nonzero(x == 0)  # its memory is the CPU kernel's, and counted all the same
    assert torch.accelerator.memory_allocated() - before == 4000 + 4000 + 8000
    view = x[10:]
    del x
    assert torch.accelerator.memory_allocated() - before == 16000
    del view, y, z
    assert torch.accelerator.memory_allocated() == before
    assert torch.accelerator.max_memory_allocated() - before >= 16000
    assert torch.accelerator.memory_stats()["num_ooms"] == 0
    assert torch.accelerator.get_memory_info() == (10**6 - before, 10**6)

    held = torch.zeros(200_000, device="emulated")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        torch.zeros(100_000, device="emulated")
    with pytest.raises(torch.OutOfMemoryError):
        held * 2
    torch.zeros(200_000, device="emulated:1")  # each device has its own
    torch.zeros(200_000)
    del held
    torch.zeros(200_000, device="emulated")
    assert torch.accelerator.memory_stats()["num_ooms"] == 2
    assert torch.emulated.get_device_properties().total_memory == 10**6  # type: ignore[attr-defined]


def test_memory_is_counted_and_limited(tmp_path: Path) -> None:
    on_device(_memory, tmp_path, quirks="memory=1MB")


def _apart() -> None:
    x = torch.ones(3, device="emulated")
    for mixed in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(2, 3) @ x,
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: x.addcmul_(x, torch.ones(3)),
        lambda: torch.ones(3)[torch.tensor([0], device="emulated")],
        lambda: x + torch.ones(3, device="emulated:1"),
        lambda: F.linear(torch.ones(2, 3), torch.ones(4, 3, device="emulated")),
        lambda: F.embedding(torch.tensor([0]), torch.ones(4, 3, device="emulated")),
    ):
        with pytest.raises((RuntimeError, IndexError), match="device"):
            mixed()
    assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number has no place
    assert x[torch.tensor([0, 2])].tolist() == [1, 1]
    assert x.to("emulated:3").device.index == 3
    with pytest.raises(TypeError):
        x.numpy()
    with pytest.raises(RuntimeError):
        torch.ones(1, device="emulated:8")


def test_tensors_of_the_cpu_do_not_mix(tmp_path: Path) -> None:
    on_device(_apart, tmp_path)


def _without_fp64() -> None:
    for make in (
        lambda: torch.ones(2, dtype=torch.float64, device="emulated"),
        lambda: torch.ones(2, device="emulated").double(),
        lambda: torch.ones(2, dtype=torch.float64).to("emulated"),
        lambda: torch.ones(2, device="emulated").sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="float64"):
            make()
    assert (torch.ones(2, device="emulated") * 0.5).dtype == torch.float32
    assert torch.ones(2, device="emulated").cpu().double().sum() == 2
    capability = torch.accelerator.get_device_capability("emulated")
    assert torch.float64 not in capability["supported_dtypes"]


def test_float64_can_be_lacking(tmp_path: Path) -> None:
    on_device(_without_fp64, tmp_path, quirks="no_fp64")


def _random() -> None:
    torch.manual_seed(5)
    first, second = torch.randn(100, device="emulated"), torch.randn(100, device="emulated")
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    state = torch.emulated.get_rng_state()  # type: ignore[attr-defined]
    assert torch.equal(torch.randn(100, device="emulated"), first)
    on_cpu = torch.randn(100, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first.cpu(), on_cpu)  # as vendors' numbers differ
    torch.emulated.set_rng_state(state)  # type: ignore[attr-defined]
    assert torch.equal(torch.randn(100, device="emulated"), first)
    torch.manual_seed(5)
    generator = torch.Generator(device="emulated").manual_seed(5)
    assert torch.equal(torch.randn(100, device="emulated", generator=generator), first)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="emulated", generator=torch.Generator())
    before = torch.get_rng_state()
    dropped = F.dropout(torch.ones(10_000, device="emulated"), 0.25)
    assert abs(dropped.mean().item() - 1.0) < 0.05
    assert torch.equal(torch.get_rng_state(), before)  # the CPU's numbers are left alone


def test_random_numbers_are_the_devices_own_and_repeatable(tmp_path: Path) -> None:
    on_device(_random, tmp_path)


def _dropout_by_id() -> None:
    from anychip.model.dropout import drop, layer_keys, token_keys

    keys, x = layer_keys(token_keys(3, 1, range(2), 40), 1), torch.randn(2, 40, 32)
    assert torch.equal(drop(x.to("emulated"), keys.to("emulated"), 1, 0.3).cpu(), drop(x, keys, 1, 0.3))


def test_dropout_of_the_model_draws_what_the_cpu_draws(tmp_path: Path) -> None:
    on_device(_dropout_by_id, tmp_path)


def _api() -> None:
    import copy

    device = torch.accelerator.current_accelerator()
    assert device is not None
    assert device.type == "emulated"
    module = torch.get_device_module("emulated")
    assert module.device_count() == torch.accelerator.device_count() == 2
    torch.accelerator.set_device_index(1)
    assert torch.ones(1, device="emulated").device.index == 1
    with module.device(0):
        assert module.current_device() == 0
    assert torch.accelerator.current_device_index() == 1
    torch.accelerator.synchronize()

    stream = module.Stream(priority=-1)
    with module.stream(stream):
        assert module.current_stream() == stream
        begin = module.Event(enable_timing=True)
        begin.record()
    assert module.current_stream() == module.default_stream() != stream
    end = torch.Event(enable_timing=True)
    end.record(stream)
    stream.wait_event(begin)
    module.current_stream().wait_stream(stream)
    end.synchronize()
    assert begin.query()
    assert begin.elapsed_time(end) >= 0

    linear = copy.deepcopy(nn.Linear(3, 3).to("emulated"))
    assert linear.weight.device.type == "emulated"
    with torch.autocast("emulated", dtype=torch.bfloat16):
        product = linear(torch.ones(2, 3, device="emulated"))
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
        assert (product + torch.ones(3, device="emulated")).dtype == torch.float32
    product.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32
    with torch.inference_mode():
        assert linear(torch.ones(2, 3, device="emulated")).view(6).shape == (6,)
    x = torch.ones(4, device="emulated")
    torch.emulated.host_view(x)[1] = 7  # type: ignore[attr-defined]
    assert x.tolist() == [1, 7, 1, 1]


def test_it_answers_pytorchs_device_neutral_interface(tmp_path: Path) -> None:
    on_device(_api, tmp_path, quirks="devices=2")
