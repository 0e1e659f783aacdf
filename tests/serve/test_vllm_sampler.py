"""vLLM as a sampler, by a stand-in for the library that answers with our own engine: what it is given and what comes
back. The library itself is not run here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from anychip.data.tokenizer import Tokenizer
from anychip.errors import InputError
from anychip.families.layouts import published_tensors
from anychip.interchange.layout import to_logical
from anychip.model.decoder import Decoder
from anychip.serve.sampler import EngineSampler
from anychip.serve.vllm_sampler import VllmSampler, layout_for_vllm
from anychip.tune.sampler import Asked


class StandIn:
    """Keeps what it is started with, takes published tensors, and answers with our engine."""

    def __init__(self, decoder: Decoder, end_id: int, **started: Any) -> None:
        self.started, self._config = started, decoder.config
        self.engine = EngineSampler(decoder.config, torch.float32, end_id, 4)
        self.caches_dropped = 0

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self)]

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors, logical = dict(named), {}
        for tensor in published_tensors(self._config, layout_for_vllm(self._config)):
            logical |= to_logical(self._config, tensor, tensors.pop(tensor.name))
        assert not tensors
        self.engine.load(logical.items())

    def reset_prefix_cache(self) -> None:
        self.caches_dropped += 1

    def generate(self, prompts: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
        found = []
        for prompt, setting in zip(prompts, settings, strict=True):
            asked = [Asked(prompt["prompt_token_ids"], str(setting.seed))]
            (said,) = self.engine.sample(asked, 0, setting.max_tokens, greedy=setting.temperature == 0)
            logprobs = [{token: SimpleNamespace(logprob=value), -1: SimpleNamespace(logprob=0.0)}
                        for token, value in zip(said.tokens, said.log_probabilities, strict=True)]  # fmt: skip
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(said.tokens), logprobs=logprobs)]))
        return found


def test_weights_go_in_as_an_export_has_them_and_answers_come_back_with_their_probabilities(
    make_decoder: Callable[..., Decoder], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, end = make_decoder(), tokenizer.eos_id
    library: Any = ModuleType("vllm")
    library.LLM = lambda **started: StandIn(decoder, end, **started)
    library.SamplingParams = lambda **fields: SimpleNamespace(**fields)
    monkeypatch.setitem(sys.modules, "vllm", library)
    sampler = VllmSampler(decoder.config, torch.float32, end, 7, tmp_path)
    assert sampler._model.started["model"] == str(tmp_path) and sampler._model.started["max_num_seqs"] == 7
    sampler.load((name, p.detach()) for name, p in decoder.named_parameters())
    assert sampler._model.caches_dropped == 1
    ours = EngineSampler(decoder.config, torch.float32, end, 4)
    ours.load((name, p.detach()) for name, p in decoder.named_parameters())
    asked = [Asked(tokenizer.encode(text), text) for text in ("the cat", "on the mat", "def f")]
    for said, expected in zip(
        sampler.sample(asked, 0, 6, greedy=True), ours.sample(asked, 0, 6, greedy=True), strict=True
    ):
        assert said.tokens == expected.tokens
        assert said.log_probabilities == pytest.approx(expected.log_probabilities, rel=1e-4)
    one, again, other = (sampler.sample(asked, seed, 6) for seed in (1, 1, 2))
    assert one == again != other
    assert all(len(said.tokens) == len(said.log_probabilities) <= 6 for said in one)


def test_without_vllm_it_is_named(make_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vllm, which is not installed"):
        VllmSampler(make_decoder().config, torch.float32, 2, 4, tmp_path)
