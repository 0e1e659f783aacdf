"""Slots: the key/value caches of all requests of a server in two tensors, so that a step attends once for all.

A slot is a `KeyValueCache` whose tensors are rows of the shared ones. A slot that no request uses keeps its tokens: a
later prompt that begins alike takes over what they have in common, by taking the slot or by copying from it, also
from a slot that is still in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anychip.model.arithmetic import kv_cache_bytes_per_token
from anychip.model.cache import KeyValueCache, kept_shape
from anychip.model.rope import keeps_published_hazard
from anychip.recipe.schema import ModelConfig

COLUMNS = 16
"""Attention of one token reads a multiple of this many columns, the rest masked: a vector of the CPU holds as many
sums, so the order of additions, and with it every bit, is that of a pass over the whole sequence."""


class Slot(KeyValueCache):
    """One sequence in the shared tensors. `tokens` are those whose keys and values it holds."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        self.config, self.index = config, index
        self.length, self._alpha = 0, 1
        self.tokens: list[int] = []
        self.shared: int | None = None
        """How many of its tokens others may take over; None: all."""
        self.busy = False
        self.used = 0
        """When it was last taken, on the clock of its `Slots`."""

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Use these [layers, 1, kv_heads, capacity, head_dim]."""
        self._hold(keys, values)

    def columns(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, count, head_dim] of the first `count` columns, filled or not."""
        keys, values = self._layers[layer]
        return keys.narrow(2, 0, count), values.narrow(2, 0, count)

    def grow(self, capacity: int) -> None:
        raise ValueError("slots grow together: use Slots.reserve")


class Slots:
    """`count` sequences of at most `context_length` tokens. Memory is taken as sequences grow, for all slots alike."""

    def __init__(
        self, config: ModelConfig, count: int, context_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.context_length = config, context_length
        self.dtype, self.device = dtype, device
        self.slots = [Slot(config, index) for index in range(count)]
        self.capacity = 0
        self.keys = self.values = torch.empty(0)
        self.reused_tokens = 0
        self._clock = 0
        self.reserve(min(256, context_length))

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of `capacity` tokens in every slot; at least doubles where it must grow."""
        if capacity <= self.capacity:
            return
        wanted = min(max(capacity, 2 * self.capacity), self.context_length)
        wanted = -(-wanted // COLUMNS) * COLUMNS
        config = self.config
        shape = (config.num_hidden_layers, len(self.slots), *kept_shape(config, wanted))
        # Zeros, because masked columns are multiplied by 0 and must be numbers.
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        values = keys if config.latent else torch.zeros_like(keys)
        for slot in self.slots:
            if slot.length:
                keys[:, slot.index, :, : slot.length] = slot.keys[:, 0, :, : slot.length]
                values[:, slot.index, :, : slot.length] = slot.values[:, 0, :, : slot.length]
            slot.hold(keys[:, slot.index : slot.index + 1], values[:, slot.index : slot.index + 1])
        self.keys, self.values, self.capacity = keys, values, wanted
        self.layers = list(zip(keys.unbind(), values.unbind(), strict=True))

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, kv_heads, capacity, head_dim] of a layer."""
        return self.layers[layer]

    @property
    def bytes_at_most(self) -> int:
        """Bytes of keys and values when every sequence reaches the context."""
        return kv_cache_bytes_per_token(self.config, self.dtype.itemsize) * len(self.slots) * self.context_length

    def take(self, prompt: Sequence[int], multiple: int = 1) -> Slot | None:
        """A slot for a request, holding the longest beginning of `prompt` that any slot holds; None if all are busy.

        All but the last token of the prompt at most, and a multiple of `multiple` tokens.
        """
        idle = [slot for slot in self.slots if not slot.busy]
        if not idle:
            return None
        source, common = self._best(prompt, multiple)
        oldest = min(idle, key=lambda slot: (bool(slot.tokens), slot.used, slot.index))
        if source is None:
            chosen, common = oldest, 0
        elif not source.busy and (common == len(source.tokens) or source is oldest):
            chosen = source
        else:
            chosen = oldest
            self.copy(source, chosen, common)
        chosen.truncate(common)
        del chosen.tokens[common:]
        self.reused_tokens += common
        self._clock += 1
        chosen.busy, chosen.used, chosen.shared = True, self._clock, None
        return chosen

    def copy(self, source: Slot, target: Slot, tokens: int) -> None:
        """Let a slot hold the first tokens of another one."""
        target.keys[..., :tokens, :] = source.keys[..., :tokens, :]
        target.values[..., :tokens, :] = source.values[..., :tokens, :]
        target.length, target._alpha, target.tokens = tokens, source._alpha, source.tokens[:tokens]

    def leave(self, slot: Slot) -> None:
        """The request of this slot has ended; its tokens stay for others."""
        slot.busy = False

    def clear(self, slot: Slot) -> None:
        """Its numbers are damaged: forget them, so that what is masked later is finite."""
        slot.keys.zero_()
        slot.values.zero_()
        slot.truncate(0)
        slot.tokens = []

    def _best(self, prompt: Sequence[int], multiple: int) -> tuple[Slot | None, int]:
        """The published rotary rule shares nothing: there a key depends on how long the prompt was."""
        if keeps_published_hazard(self.config):
            return None, 0
        best, length = None, 0
        for slot in self.slots:
            common = common_beginning(slot.tokens[: slot.shared], prompt, len(prompt) - 1) // multiple * multiple
            if common > length:
                best, length = slot, common
        return best, length


def common_beginning(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """How many of the first `limit` tokens are alike."""
    limit = min(len(one), len(other), limit)
    if one[:limit] == other[:limit]:
        return limit
    low, high = 0, limit  # alike up to low, different before high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
