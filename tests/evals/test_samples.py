"""Sample answers are the likeliest continuation of the template's prompt, and are kept with the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from anychip.data.tokenizer import Tokenizer, train_bpe
from anychip.evals.samples import greedy_answer, sample_answers
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe.schema import ModelConfig
from anychip.rundir import RunDirectory


@dataclass(frozen=True)
class Loaded:
    decoder: Decoder
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Asked:
    question: str
    reference: str = "the reference"
    novelty: str = "trained"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    tokenizer = train_bpe(["what is a list? it is a list of things. " * 20], vocab_size=290)
    config = ModelConfig(
        vocab_size=290,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )
    decoder = Decoder(config)
    init_parameters(decoder, config, seed=2)
    return Loaded(decoder, tokenizer)


def continuation(decoder: Decoder, prompt: list[int], length: int) -> list[int]:
    """Without a cache, one full forward pass a token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(decoder.logits(decoder(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(prompt) :]


def test_is_greedy_and_stops_at_the_end_token(loaded: Loaded) -> None:
    prompt = [4, 30, 31, 5]
    expected = continuation(loaded.decoder, prompt, 12)
    assert greedy_answer(loaded.decoder, prompt, -1, 12) == expected
    stop = expected[5]
    assert greedy_answer(loaded.decoder, prompt, stop, 12) == expected[: expected.index(stop)]


def test_answers_are_asked_in_the_chat_template_and_kept(loaded: Loaded, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (found,) = sample_answers(loaded, [Asked("what is a list?")], run, system_prompt="be brief", max_new_tokens=8)
    encode = loaded.tokenizer.encode
    prompt = [6, *encode("be brief\n"), 4, *encode("what is a list?"), 5]
    ids = greedy_answer(loaded.decoder, prompt, loaded.tokenizer.eos_id, 8)
    assert found.answer == loaded.tokenizer.decode(ids).strip()
    (kept,) = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert kept == {
        "question": "what is a list?",
        "answer": found.answer,
        "reference": "the reference",
        "novelty": "trained",
    }
