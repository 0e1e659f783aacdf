"""Log-probabilities of served tokens are those of the training forward, also of a model that has learned something."""

from __future__ import annotations

import pytest
import torch

from anychip.chips.backend import detect_backend
from anychip.chips.operators.prepared import packs_bf16
from anychip.model.decoder import Decoder
from anychip.serve.engine import Engine
from anychip.serve.inference import InferenceModel
from anychip.serve.request import Event, Request
from anychip.train.loss import head_cross_entropy

from .test_batch import WARM, drain, logprobs, prompts, tokens, trained_like, training_logprobs

BARS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
_STEPS, _ROWS, _LENGTH, _VOCABULARY = 80, 8, 64, 512


@pytest.fixture(scope="module")
def learned() -> Decoder:
    """Trained to follow one token by another nine times in ten: probabilities near 1 and 1e-4, norms away from 1."""
    decoder = trained_like().train()
    decoder.compute_dtype = torch.bfloat16 if detect_backend().multiplies_bf16() else torch.float32
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(4)
    for _ in range(_STEPS):
        ids = torch.randint(0, _VOCABULARY, (_ROWS, _LENGTH + 1), generator=generator)
        chance = torch.rand(ids.shape, generator=generator) < 0.9
        for place in range(1, _LENGTH + 1):
            ids[:, place] = torch.where(chance[:, place], (ids[:, place - 1] * 7 + 3) % _VOCABULARY, ids[:, place])
        hidden = decoder(ids[:, :-1]).flatten(0, 1)
        loss = head_cross_entropy(hidden, decoder.head_weight, ids[:, 1:].flatten(), 512) / hidden.shape[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 3.0, "it has learned most of what there is to learn (6.2 to 1.0 nats)"
    return decoder.eval()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(learned: Decoder, request: pytest.FixtureRequest) -> tuple[Decoder, InferenceModel, float]:
    """The decoder computing in a dtype, the engine's model of it, and the bar."""
    learned.compute_dtype = request.param
    prepared = InferenceModel(learned, request.param)
    if prepared.precision.activations != request.param:
        pytest.skip("this chip does not multiply bf16; its products are fp32")
    return learned, prepared, BARS[request.param]


Asked = dict[str, tuple[Request, list[Event]]]


def ask(model: InferenceModel, max_batch: int) -> Asked:
    """Requests that come and go, prompts of one piece and of several; two begin alike."""
    engine = Engine(model, max_batch=max_batch, prefill_tokens=48)
    asked = prompts(16, [3, 17, 60, 100])
    asked[9] = [*asked[3][:50], 7, 11]
    requests = [Request(str(i), prompt, WARM, top_logprobs=0, seed=i) for i, prompt in enumerate(asked)]
    found = drain(engine.new_batch(), {0: requests[:5], 4: requests[5:12], 9: requests[12:]})
    return {request.id: (request, found[request.id]) for request in requests}


def largest_difference(decoder: Decoder, found: Asked) -> tuple[float, float]:
    """And how unlikely the least likely token was."""
    worst, least = 0.0, 0.0
    for request, events in found.values():
        theirs = training_logprobs(decoder, request.prompt, tokens(events))
        worst = max(worst, *(abs(a - b) for a, b in zip(logprobs(events), theirs, strict=True)))
        least = min(least, *theirs)
    return worst, least


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_of_a_trained_model(model: tuple[Decoder, InferenceModel, float], max_batch: int) -> None:
    decoder, prepared, bar = model
    worst, least = largest_difference(decoder, ask(prepared, max_batch))
    print(f"\nmax difference {decoder.compute_dtype}, {max_batch} at a time: {worst:.2e}; least likely: {least:.1f}")
    assert least < -5, "the comparison has seen unlikely tokens"
    assert worst <= bar


def test_a_conversation_that_goes_on(model: tuple[Decoder, InferenceModel, float]) -> None:
    """A session of its own, whose cache is not one of the slots."""
    decoder, prepared, bar = model
    engine = Engine(prepared, prefill_tokens=48)
    session, prompt = engine.new_session(), prompts(1, [60])[0]
    for turn in range(3):
        events = list(engine.stream(Request(str(turn), prompt, WARM, top_logprobs=0), session))
        theirs = training_logprobs(decoder, prompt, tokens(events))
        assert logprobs(events) == pytest.approx(theirs, abs=bar)
        prompt = [*prompt, *tokens(events), 30 + turn, 40, 50]


@pytest.mark.skipif(not packs_bf16(torch.device("cpu")), reason="this chip has no kernels of ours")
def test_in_bf16_bit_for_bit_where_we_have_kernels(learned: Decoder) -> None:
    """Inner sizes beyond what PyTorch's product adds up at a time, heads that share keys, a head of muP."""
    for changes in ({"intermediate_size": 1200}, {"num_key_value_heads": 1}, {"output_mult": 0.5, "input_mult": 2.0}):
        decoder = trained_like(**changes)
        decoder.compute_dtype = torch.bfloat16
        worst, _ = largest_difference(decoder, ask(InferenceModel(decoder, torch.bfloat16), 5))
        assert worst == 0.0, changes
    learned.compute_dtype = torch.bfloat16
    worst, _ = largest_difference(learned, ask(InferenceModel(learned, torch.bfloat16), 5))
    assert worst == 0.0
