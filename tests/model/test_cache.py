"""Decoding with cached keys and values, within the training length and across steps of the rotary base."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from telechat2_reference import angles_at, exact_rule, forward, published_rule
from torch import Tensor

from anychip.model.cache import KeyValueCache
from anychip.model.decoder import Decoder
from anychip.model.rope import RotaryTable, cos_sin, rope_scale, rotary
from anychip.recipe.schema import ModelConfig, RopeScaling

IDS = [(7 * i * i + 3 * i + 1) % 67 for i in range(36)]  # steps of 8, 16 and 32 lie inside


def decode(decoder: Decoder, ids: list[int], chunks: list[int]) -> Tensor:
    """Logits [len(ids), vocab_size] when `ids` are read in pieces of these sizes."""
    cache = KeyValueCache(decoder.config, 1, len(ids), torch.float32, torch.device("cpu"))
    logits, start = [], 0
    with torch.no_grad():
        for size in chunks:
            logits.append(decoder.logits(decoder(torch.tensor([ids[start : start + size]]), cache))[0])
            start += size
    return torch.cat(logits).double()


@pytest.mark.parametrize("chunks", [[1] * 36, [9] + [1] * 27, [5, 7, 1, 1, 11, 11], [36]])
def test_cached_decoding_equals_a_full_pass_at_every_position(
    make_config: Callable[..., ModelConfig], random_decoder: Callable[[ModelConfig], Decoder], chunks: list[int]
) -> None:
    decoder = random_decoder(make_config())
    with torch.no_grad():
        full = decoder.logits(decoder(torch.tensor([IDS])))[0].double()
    torch.testing.assert_close(decode(decoder, IDS, chunks), full, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[1] * 36, [20] + [1] * 16, [3, 30, 1, 2]])
def test_old_keys_follow_the_rule_when_the_base_steps(
    make_config: Callable[..., ModelConfig],
    random_decoder: Callable[[ModelConfig], Decoder],
    short_scaling: Callable[[str], RopeScaling],
    chunks: list[int],
) -> None:
    config = make_config(rope_scaling=short_scaling("rerotate"))
    decoder = random_decoder(config)
    read_at = [
        end for end, size in zip(torch.tensor(chunks).cumsum(0).tolist(), chunks, strict=True) for _ in range(size)
    ]
    expected = forward(config, dict(decoder.named_parameters()), IDS, read_at, exact_rule(config))
    torch.testing.assert_close(decode(decoder, IDS, chunks), expected, atol=3e-4, rtol=1e-4)


def test_with_one_layer_that_is_a_full_pass_at_every_length(
    make_config: Callable[..., ModelConfig],
    random_decoder: Callable[[ModelConfig], Decoder],
    short_scaling: Callable[[str], RopeScaling],
) -> None:
    decoder = random_decoder(make_config(num_hidden_layers=1, rope_scaling=short_scaling("rerotate")))
    step_by_step = decode(decoder, IDS, [1] * len(IDS))
    for length in range(1, len(IDS) + 1):
        with torch.no_grad():
            full = decoder.logits(decoder(torch.tensor([IDS[:length]])))[0, -1].double()
        torch.testing.assert_close(step_by_step[length - 1], full, atol=3e-4, rtol=1e-4)


def test_forgetting_and_reading_on_is_as_if_nothing_had_been(
    make_config: Callable[..., ModelConfig],
    random_decoder: Callable[[ModelConfig], Decoder],
    short_scaling: Callable[[str], RopeScaling],
) -> None:
    """Truncation below a step turns the keys back."""
    config = make_config(num_hidden_layers=1, rope_scaling=short_scaling("rerotate"))
    decoder = random_decoder(config)
    cache = KeyValueCache(config, 1, 40, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        decoder(torch.tensor([IDS]), cache)
        cache.truncate(6)
        found = decoder.logits(decoder(torch.tensor([[50]]), cache))[0, -1]
        expected = decoder.logits(decoder(torch.tensor([[*IDS[:6], 50]])))[0, -1]
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


def test_growing_keeps_what_is_there(
    make_config: Callable[..., ModelConfig], random_decoder: Callable[[ModelConfig], Decoder]
) -> None:
    decoder = random_decoder(make_config())
    cache = KeyValueCache(decoder.config, 1, 0, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for start in range(0, 36, 6):
            cache.grow(start + 6)
            cache.grow(3)
            found = decoder.logits(decoder(torch.tensor([IDS[start : start + 6]]), cache))[0, -1]
        expected = decoder.logits(decoder(torch.tensor([IDS])))[0, -1]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_a_full_cache_says_so(make_config: Callable[..., ModelConfig]) -> None:
    cache = KeyValueCache(make_config(), 1, 4, torch.float32, torch.device("cpu"))
    cache.extend(4)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        cache.extend(1)


@pytest.mark.parametrize(
    ("length", "alpha"), [(1, 1), (8192, 1), (8193, 3), (16384, 3), (16385, 7), (32768, 7), (32769, 15)]
)
def test_steps_of_the_published_rule(make_config: Callable[..., ModelConfig], length: int, alpha: int) -> None:
    config = make_config(rope_scaling=RopeScaling(), max_position_embeddings=65_536)
    scale = rope_scale(config, length)
    assert scale.alpha == alpha
    assert scale.mscale == pytest.approx(angles_at(config, 0, length)[1])
    assert rope_scale(make_config(), length).alpha == 1


@pytest.mark.parametrize("cached_keys", ["rerotate", "published"])
def test_the_kept_table_equals_the_computed_one(
    make_config: Callable[..., ModelConfig], short_scaling: Callable[[str], RopeScaling], cached_keys: str
) -> None:
    config = make_config(rope_scaling=short_scaling(cached_keys))
    table = RotaryTable(config, torch.device("cpu"))
    for start, end, length in [(0, 5, 5), (5, 6, 6), (6, 9, 9), (9, 40, 40), (0, 4, 20), (3, 8, 8), (40, 64, 64)]:
        kept, computed = table.rows(start, end, length), rotary(config, start, end, length)
        assert torch.equal(kept.cos, computed.cos)
        assert torch.equal(kept.sin, computed.sin)
        assert kept.score_scale == computed.score_scale


def test_tables_keep_the_phase_of_far_positions(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(max_position_embeddings=1_000_000)
    cos, sin = cos_sin(config, torch.tensor([999_983]), alpha=1)
    angles, _ = angles_at(config, 999_983, 1)
    torch.testing.assert_close(cos[0].double(), angles.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin[0].double(), angles.sin(), atol=1e-7, rtol=0)


def test_published_mode_keeps_the_published_hazard_in_the_decoder(
    make_config: Callable[..., ModelConfig],
    random_decoder: Callable[[ModelConfig], Decoder],
    short_scaling: Callable[[str], RopeScaling],
) -> None:
    config = make_config(rope_scaling=short_scaling("published"))
    decoder = random_decoder(config)
    read_at = [20] * 20 + list(range(21, 37))
    expected = forward(config, dict(decoder.named_parameters()), IDS, read_at, published_rule(config))
    torch.testing.assert_close(decode(decoder, IDS, [20] + [1] * 16), expected, atol=3e-4, rtol=1e-4)
