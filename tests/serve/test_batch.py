"""Many requests in one step: what each gets, whoever is beside it; what they share; who waits for whom."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from anychip.chips.backend import detect_backend
from anychip.chips.operators import operators_for
from anychip.data.batch import IGNORE_LABEL
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe.schema import ModelConfig, RopeScaling, SamplingConfig
from anychip.serve.batch import Batch
from anychip.serve.engine import Engine
from anychip.serve.inference import InferenceModel
from anychip.serve.request import Event, Request, TokenLogprob
from anychip.serve.slots import common_beginning
from anychip.train.objective import Head

WARM = SamplingConfig(temperature=1.0, max_new_tokens=12)


def trained_like(**changes: object) -> Decoder:
    """A decoder with the weights that training starts from: their logits are as small as a real model's."""
    fields: dict[str, object] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = ModelConfig.model_validate({**fields, **changes})
    decoder = Decoder(config, operators=operators_for(detect_backend().vendor))
    init_parameters(decoder, config, seed=0)
    return decoder.eval()


def prompts(count: int, lengths: Sequence[int], vocabulary: int = 512) -> list[list[int]]:
    chance = random.Random(5)
    return [[chance.randrange(20, vocabulary) for _ in range(chance.choice(lengths))] for _ in range(count)]


def drain(batch: Batch, arrivals: dict[int, list[Request]]) -> dict[str, list[Event]]:
    """Step until nothing is left, adding requests at their step."""
    found: dict[str, list[Event]] = {}
    step = 0
    while len(batch) or any(at >= step for at in arrivals):
        for request in arrivals.get(step, []):
            batch.add(request)
        for event in batch.step():
            found.setdefault(event.request_id, []).append(event)
        step += 1
    return found


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def logprobs(events: list[Event]) -> list[float]:
    return [event.logprob.logprob for event in events if event.logprob is not None]


def training_logprobs(decoder: Decoder, prompt: Sequence[int], answer: list[int]) -> list[float]:
    """What the forward pass of training gives for each token of the answer, in a sequence of whole length."""
    ids = [*prompt, *answer]
    padded = torch.tensor([ids + [0] * (decoder.config.max_position_embeddings - len(ids))])
    labels = torch.full_like(padded, IGNORE_LABEL)
    labels[0, len(prompt) - 1 : len(ids) - 1] = torch.tensor(answer)
    with torch.inference_mode():
        found = Head(decoder.head_weight, 64).token_log_probabilities(decoder(padded), labels)
    return found[0, len(prompt) - 1 : len(ids) - 1].tolist()


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_served_log_probabilities_are_those_of_training(dtype: torch.dtype, bar: float, max_batch: int) -> None:
    decoder = trained_like()
    engine = Engine(InferenceModel(decoder, dtype), max_batch=max_batch, prefill_tokens=48)
    if engine.model.precision.activations != dtype:
        pytest.skip("this chip does not multiply bf16; its products are fp32")
    decoder.compute_dtype = dtype
    asked = prompts(16, [3, 17, 60, 100])
    requests = [Request(str(i), prompt, WARM, top_logprobs=0, seed=i) for i, prompt in enumerate(asked)]
    found = drain(engine.new_batch(), {0: requests[:5], 4: requests[5:12], 9: requests[12:]})
    worst = 0.0
    for request, prompt in zip(requests, asked, strict=True):
        events = found[request.id]
        theirs = training_logprobs(decoder, prompt, tokens(events))
        worst = max(worst, *(abs(a - b) for a, b in zip(logprobs(events), theirs, strict=True)))
    print(f"\nmax difference {dtype}, {max_batch} at a time: {worst:.2e}")
    assert worst <= bar


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_answers_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    model = InferenceModel(trained_like(), dtype, invariant=True)
    shared = prompts(1, [70])[0]
    asked = [*prompts(5, [3, 17, 60, 100]), shared, shared[:40] + prompts(1, [9])[0], shared]
    requests = [
        Request(str(i), prompt, SamplingConfig(temperature=1.0, max_new_tokens=4 + i), top_logprobs=2, seed=i)
        for i, prompt in enumerate(asked)
    ]
    alone = {}
    for request in requests:
        alone |= drain(Engine(model, max_batch=1, prefill_tokens=16).new_batch(), {0: [request]})
    together = drain(
        Engine(model, max_batch=4, prefill_tokens=16).new_batch(), {0: requests[:3], 2: requests[3:6], 7: requests[6:]}
    )
    assert together == alone  # tokens, log-probabilities and those of the likeliest, to the last bit


def test_prompts_share_what_they_have_in_common(make_decoder: Callable[..., Decoder]) -> None:
    engine = Engine(InferenceModel(make_decoder(), torch.float32), max_batch=6, prefill_tokens=64)
    common = [(13 * i + 21) % 320 for i in range(60)]
    requests = [Request(str(i), [*common, 30 + i, 40 + i], WARM, seed=1) for i in range(6)]
    expected = {request.id: tokens(list(engine.stream(request))) for request in requests}
    batch = engine.new_batch()
    found = drain(batch, {0: requests})  # five come while the first is being read: they wait for it
    assert {name: tokens(events) for name, events in found.items()} == expected
    assert batch.slots.reused_tokens == 5 * 60
    again = drain(batch, {0: [Request("again", [*requests[3].prompt, *expected["3"], 77], WARM)]})
    assert batch.slots.reused_tokens == 5 * 60 + 62 + 11, "a conversation goes on from its slot, but for its last token"
    assert len(tokens(again["again"])) == 12


def test_the_published_rotary_rule_shares_nothing(make_decoder: Callable[..., Decoder]) -> None:
    scaling = RopeScaling(base_length=16, training_length=16, cached_keys="published")
    engine = Engine(InferenceModel(make_decoder(rope_scaling=scaling), torch.float32), max_batch=2)
    batch = engine.new_batch()
    request = Request("a", list(range(20, 60)), WARM)
    drain(batch, {0: [request]})
    drain(batch, {0: [Request("b", list(range(20, 60)), WARM)]})
    assert batch.slots.reused_tokens == 0


def test_rotary_scaling_steps_in_a_slot_as_in_a_cache_of_its_own(make_decoder: Callable[..., Decoder]) -> None:
    scaling = RopeScaling(base_length=16, training_length=32)
    engine = Engine(InferenceModel(make_decoder(rope_scaling=scaling), torch.float32), max_batch=3)
    greedy = SamplingConfig(temperature=0, max_new_tokens=30)
    requests = [Request(str(n), list(range(20, 20 + n)), greedy) for n in (5, 14, 40)]
    found = drain(engine.new_batch(), {0: requests})
    for request in requests:
        assert tokens(found[request.id]) == tokens(list(engine.stream(request)))


def test_a_long_prompt_does_not_hold_back_running_answers(inference: InferenceModel) -> None:
    batch = Engine(inference, max_batch=3, prefill_tokens=8).new_batch()
    batch.add(Request("short", [20, 30], WARM))
    batch.step()
    batch.add(Request("long", [(7 * i) % 320 for i in range(100)], WARM))
    for _ in range(11):  # twelve pieces of the long prompt are read beside the answer
        assert [event.request_id for event in batch.step()] == ["short"]


def test_one_very_long_conversation_beside_short_ones(inference: InferenceModel) -> None:
    """The long one attends alone, the others together; all get what they get alone."""
    engine = Engine(inference, context_length=128, max_batch=8)
    requests = [Request(str(i), [(i + 3 * j) % 320 for j in range(100 if i == 2 else 4)], WARM) for i in range(8)]
    found = drain(engine.new_batch(), {0: requests})
    for request in requests:
        assert tokens(found[request.id]) == tokens(list(engine.stream(request)))


def test_a_cancelled_request_makes_room_at_once(inference: InferenceModel) -> None:
    batch = Engine(inference, max_batch=1).new_batch()
    for name in ("first", "second", "third"):
        batch.add(Request(name, [20, 30, 40], WARM))
    batch.step()
    batch.cancel("first")
    batch.cancel("third")
    batch.cancel("unknown")
    assert len(batch) == 1
    assert {event.request_id for event in batch.step()} == {"second"}


def test_penalties_and_bias_change_what_is_chosen(inference: InferenceModel) -> None:
    engine = Engine(inference)
    greedy = SamplingConfig(temperature=0, max_new_tokens=20)
    prompt = [20, 45, 100]
    plain = tokens(list(engine.stream(Request("r", prompt, greedy))))
    unlike = tokens(list(engine.stream(Request("r", prompt, greedy, presence_penalty=1000.0))))
    assert len(set(unlike)) == 20 > len(set(plain)), "a token that was answered never comes again"
    per_use = tokens(list(engine.stream(Request("r", prompt, greedy, frequency_penalty=1000.0))))
    assert per_use == unlike
    assert set(tokens(list(engine.stream(Request("r", prompt, greedy, logit_bias={7: 1e4}))))) == {7}
    banned = tokens(list(engine.stream(Request("r", prompt, greedy, logit_bias=dict.fromkeys(plain, -1e4)))))
    assert not set(banned) & set(plain)


def test_log_probabilities_of_a_prompt(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder()
    batch = Engine(InferenceModel(decoder, torch.float32), prefill_tokens=7).new_batch()
    prompt = [20, 45, 100, 7, 300, 33, 80, 250, 11, 12]
    for name in ("first", "second"):  # the second must not skip what it shares with the first
        events = drain(batch, {0: [Request(name, prompt, WARM, top_logprobs=3, prompt_logprobs=True)]})[name]
        with torch.no_grad():
            expected = decoder.logits(decoder(torch.tensor([prompt]))[0]).log_softmax(-1)
        found = events[0].prompt_logprobs
        assert found is not None
        assert [one.token for one in found] == prompt[1:]
        for index, one in enumerate(found):
            assert one.logprob == pytest.approx(float(expected[index, prompt[index + 1]]), abs=1e-4)
            assert [token for token, _ in one.top] == expected[index].topk(3).indices.tolist()
        assert all(event.prompt_logprobs is None for event in events[1:])


def test_damaged_numbers_end_one_answer_and_not_the_batch(inference: InferenceModel) -> None:
    batch = Engine(inference, max_batch=2).new_batch()
    batch.add(Request("bad", [20, 30], WARM))
    batch.add(Request("good", [40, 50], WARM))
    batch.step()
    slot = batch.running["bad"].cache
    slot.values[:, :, :, 0] = float("nan")
    events = batch.step()
    assert {event.request_id: event.finish_reason for event in events} == {"bad": "error", "good": None}
    after = drain(batch, {0: [Request("after", [60, 70], WARM)]})
    assert after["after"][-1].finish_reason == "length", "the slot is clean again"


def test_int8_weights_stay_close() -> None:
    decoder = trained_like()
    exact = Engine(InferenceModel(decoder, torch.float32))
    small = Engine(InferenceModel(decoder, torch.bfloat16, int8=True))
    for length in (8, 40):  # few rows and many take different ways
        request = Request("r", prompts(1, [length])[0], WARM, top_logprobs=0, prompt_logprobs=True)
        ours, theirs = (next(iter(engine.stream(request))).prompt_logprobs for engine in (small, exact))
        assert ours is not None and theirs is not None
        assert _mean_difference(ours, theirs) < 0.02


def _mean_difference(ours: Sequence[TokenLogprob], theirs: Sequence[TokenLogprob]) -> float:
    return sum(abs(a.logprob - b.logprob) for a, b in zip(ours, theirs, strict=True)) / len(ours)


def test_common_beginning() -> None:
    chance = random.Random(1)
    for _ in range(300):
        one, other = ([chance.randrange(2) for _ in range(chance.randrange(12))] for _ in range(2))
        limit = chance.randrange(12)
        expected = 0
        while expected < min(len(one), len(other), limit) and one[expected] == other[expected]:
            expected += 1
        assert common_beginning(one, other, limit) == expected
