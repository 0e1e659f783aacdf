"""One step's gradients do not depend on how the batch is cut, or on recomputation."""

from __future__ import annotations

import pytest
import torch

from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe.schema import ModelConfig
from anychip.train.loss import head_cross_entropy
from anychip.train.recompute import apply_recompute

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def decoder() -> Decoder:
    model = Decoder(CONFIG)
    init_parameters(model, CONFIG, 3)
    return model


def batch() -> Batch:
    tokens = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(5))
    labels = tokens[:, 1:].clone()
    labels[::3, :9] = IGNORE_LABEL  # rows with unequal numbers of labels: a mean of means would be wrong
    return Batch(tokens[:, :-1], labels)


def gradients(model: Decoder, rows_at_a_time: int) -> dict[str, torch.Tensor]:
    whole = batch()
    count = int((whole.labels != IGNORE_LABEL).sum())
    for start in range(0, 8, rows_at_a_time):
        part = slice(start, start + rows_at_a_time)
        hidden = model(whole.input_ids[part]).flatten(0, 1)
        (head_cross_entropy(hidden, model.lm_head.weight, whole.labels[part].flatten(), 16) / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole_batch(rows_at_a_time: int) -> None:
    whole, cut = gradients(decoder(), 8), gradients(decoder(), rows_at_a_time)
    for name, expected in whole.items():
        torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit(mode: str) -> None:
    plain, model = gradients(decoder(), 4), decoder()
    apply_recompute(model, mode)  # type: ignore[arg-type]
    for name, expected in gradients(model, 4).items():
        assert torch.equal(plain[name], expected), name


def bytes_kept_for_backward(mode: str) -> int:
    model = decoder()
    apply_recompute(model, mode)  # type: ignore[arg-type]
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(batch().input_ids)
    assert hidden.shape == (8, 16, 32)
    return sum(kept.values())


def test_full_recomputation_keeps_less_than_none() -> None:
    assert bytes_kept_for_backward("full") < bytes_kept_for_backward("none") / 2
