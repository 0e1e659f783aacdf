"""Keys and values of the tokens that were already read."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip.model.rope import cos_sin, keeps_published_hazard, rope_scale
from anychip.recipe.schema import ModelConfig


def kept_shape(config: ModelConfig, capacity: int) -> tuple[int, int, int]:
    """(heads, capacity, width) of what one layer keeps of a sequence."""
    if config.latent:
        return 1, capacity, config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_key_value_heads, capacity, config.head_dim


class KeyValueCache:
    """Preallocated keys and values of every layer for `batch` sequences of equal length.

    keys, values: [layers, batch, kv_heads, capacity, head_dim] in `dtype`. `length` tokens are filled. With latent
    attention both are the same tensor: one head of the latent and the key's turned part behind it.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, batch, *kept_shape(config, capacity))
        self.config = config
        self.length = 0
        self._alpha = 1
        keys = torch.empty(shape, dtype=dtype, device=device)
        self._hold(keys, keys if config.latent else torch.empty_like(keys))

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.capacity = keys, values, keys.shape[3]
        self._layers = list(zip(keys.unbind(), values.unbind(), strict=True))

    def extend(self, tokens: int, sequence_length: int | None = None) -> None:
        """Make room for `tokens` more, turning the cached keys when the rotary base steps (see rope.py).

        `sequence_length` is the S of the rotary rule: the whole prompt's, where it is read in pieces; by default the
        length that the cache now has.
        """
        length = self.length + tokens
        if length > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {length} are needed")
        alpha = rope_scale(self.config, sequence_length or length).alpha
        if alpha != self._alpha and self.length and not keeps_published_hazard(self.config):
            self._rerotate(alpha)
        self._alpha = alpha
        self.length = length

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest [batch, kv_heads, new, head_dim]; return everything up to `length`."""
        new = keys.shape[2]
        kept_keys, kept_values = self._layers[layer]  # narrow, because slicing takes longer than a small copy
        kept_keys.narrow(2, self.length - new, new).copy_(keys)
        kept_values.narrow(2, self.length - new, new).copy_(values)
        return kept_keys.narrow(2, 0, self.length), kept_values.narrow(2, 0, self.length)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values [batch, kv_heads, capacity, head_dim] of a layer, filled or not."""
        return self._layers[layer]

    def grow(self, capacity: int) -> None:
        """Move to `capacity` tokens, keeping what is there; never shrinks."""
        if capacity <= self.capacity:
            return
        shape = (*self.keys.shape[:3], capacity, self.keys.shape[4])
        keys = self.keys.new_empty(shape)
        values = keys if self.config.latent else self.values.new_empty(shape)
        keys[..., : self.length, :] = self.keys[..., : self.length, :]
        values[..., : self.length, :] = self.values[..., : self.length, :]
        self._hold(keys, values)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def _rerotate(self, alpha: int) -> None:
        positions = torch.arange(self.length, device=self.keys.device)
        old_cos, old_sin = cos_sin(self.config, positions, self._alpha)
        new_cos, new_sin = cos_sin(self.config, positions, alpha)
        cos, sin = new_cos * old_cos + new_sin * old_sin, new_sin * old_cos - new_cos * old_sin  # new angle - old angle
        half = self.config.head_dim // 2
        for layer in self.keys:  # one layer at a time bounds the fp32 copies
            keys = layer[:, :, : self.length].float()
            first, second = keys[..., :half], keys[..., half:]
            layer[:, :, : self.length] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(
                layer.dtype
            )
