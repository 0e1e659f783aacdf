"""Bits per byte: how many bits a model needs for one byte of held-out text. Comparable over any tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anychip.data.batch import Batch

if TYPE_CHECKING:
    from anychip.model.decoder import Decoder


@dataclass(frozen=True)
class BitsPerByte:
    """The code length of a text: `bits` for `tokens` predicted tokens, which stand for `utf8_bytes` bytes of text."""

    bits: float
    tokens: int
    utf8_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.utf8_bytes

    @property
    def nats_per_token(self) -> float:
        """The usual validation loss."""
        return self.bits * math.log(2) / self.tokens


def evaluate_bits_per_byte(
    model: Decoder, batches: Iterable[tuple[Batch, int]], chunk_tokens: int = 1024
) -> BitsPerByte:
    """Code length of held-out batches under `model`, in its own compute dtype; softmax and sums are fp32 or wider.

    Logits of `chunk_tokens` tokens exist at one time. See `measure_bits_per_byte`.
    """
    import torch

    from anychip.train.loss import head_cross_entropy

    device = model.head_weight.device

    def score(batch: Batch) -> float:
        documents = None if batch.documents is None else batch.documents.to(device)
        hidden = model(batch.input_ids.to(device), documents=documents).flatten(0, 1)
        return head_cross_entropy(hidden, model.head_weight, batch.labels.to(device).flatten(), chunk_tokens).item()

    was_training = model.training
    model.eval()
    with torch.no_grad():
        measured = measure_bits_per_byte(score, batches)
    model.train(was_training)
    return measured


def measure_bits_per_byte(score: Callable[[Batch], float], batches: Iterable[tuple[Batch, int]]) -> BitsPerByte:
    """Code length of held-out batches; `score` gives the summed loss of one in nats.

    `batches` yields a Batch and the UTF-8 bytes that its labels stand for; labels of -100 are context only. Special
    tokens such as `<_end>` cost bits and stand for no bytes, so the model pays for knowing where a document ends.
    Raises ValueError when no byte was scored.
    """
    nats, tokens, utf8_bytes = 0.0, 0, 0
    for batch, batch_bytes in batches:
        nats += score(batch)
        tokens += batch.num_labels
        utf8_bytes += batch_bytes
    if utf8_bytes == 0:
        raise ValueError("no held-out text was scored")
    return BitsPerByte(nats / math.log(2), tokens, utf8_bytes)
