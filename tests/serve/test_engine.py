"""Generation: the same tokens as full passes, stops, limits, batches, sessions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from anychip.errors import InputError, UnfitError
from anychip.model.decoder import Decoder
from anychip.recipe.schema import RopeScaling, SamplingConfig
from anychip.serve.engine import Engine, Request
from anychip.serve.inference import InferenceModel
from anychip.serve.sampling import uniform_draw
from serve.one_token import choose_token

GREEDY = SamplingConfig(temperature=0, max_new_tokens=10)
WARM = SamplingConfig(temperature=1.5, max_new_tokens=10)
PROMPT = [20, 45, 100, 7, 300, 33, 80, 250]


def tokens_of(engine: Engine, request: Request) -> list[int]:
    return [event.token for event in engine.stream(request) if event.token is not None]


def test_greedy_is_the_argmax_of_full_passes(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder()
    engine = Engine(InferenceModel(decoder, torch.float32))
    ids = list(PROMPT)
    for token in tokens_of(engine, Request("r", PROMPT, GREEDY)):
        with torch.no_grad():
            assert token == int(decoder.logits(decoder(torch.tensor([ids]))[0, -1]).argmax())
        ids.append(token)
    assert len(ids) == len(PROMPT) + 10


def test_token_i_is_drawn_with_number_i_of_the_request(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder()
    sampling = SamplingConfig(temperature=1.5, top_p=0.9, repetition_penalty=1.2, max_new_tokens=10)
    engine = Engine(InferenceModel(decoder, torch.float32))
    ids = list(PROMPT)
    for index, token in enumerate(tokens_of(engine, Request("r", PROMPT, sampling, seed=3))):
        with torch.no_grad():
            logits = decoder.logits(decoder(torch.tensor([ids]))[0, -1])
        assert token == choose_token(logits, ids, sampling, uniform_draw(3, "r", index))
        ids.append(token)


def test_a_long_prompt_is_read_in_pieces(inference: InferenceModel) -> None:
    prompt = [(11 * i + 20) % 320 for i in range(50)]
    whole = tokens_of(Engine(inference), Request("r", prompt, GREEDY))
    assert tokens_of(Engine(inference, prefill_tokens=7), Request("r", prompt, GREEDY)) == whole


def test_the_seed_decides(inference: InferenceModel) -> None:
    engine = Engine(inference)
    first = tokens_of(engine, Request("r", PROMPT, WARM, seed=1))
    assert tokens_of(engine, Request("r", PROMPT, WARM, seed=1)) == first
    assert tokens_of(engine, Request("r", PROMPT, WARM, seed=2)) != first
    assert tokens_of(engine, Request("s", PROMPT, WARM, seed=1)) != first


def test_neighbours_change_nothing(inference: InferenceModel) -> None:
    """Seven requests of different lengths, three at a time, answer as each alone."""
    requests = [
        Request(
            str(i),
            [(i * 31 + j * 7) % 320 for j in range(1 + 5 * i)],
            SamplingConfig(temperature=1.2, max_new_tokens=3 + i),
        )
        for i in range(7)
    ]
    engine = Engine(inference, max_batch=3, prefill_tokens=8)
    together: dict[str, list[int]] = {request.id: [] for request in requests}
    reasons = {}
    for event in engine.run(requests):
        if event.token is not None:
            together[event.request_id].append(event.token)
        if event.finish_reason:
            reasons[event.request_id] = event.finish_reason
    assert together == {request.id: tokens_of(engine, request) for request in requests}
    assert set(reasons.values()) == {"length"}
    assert len(reasons) == 7


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(inference: InferenceModel) -> None:
    engine = Engine(inference)
    free = tokens_of(engine, Request("r", PROMPT, GREEDY))
    stop = free[4]
    events = list(engine.stream(Request("r", PROMPT, GREEDY, stop_ids=frozenset((stop, 999)))))
    assert [event.token for event in events[:-1]] == free[: free.index(stop)]
    assert (events[-1].token, events[-1].finish_reason) == (None, "stop")


def test_an_answer_ends_with_its_limit_or_the_context(inference: InferenceModel) -> None:
    events = list(Engine(inference).stream(Request("r", PROMPT, GREEDY)))
    assert [event.finish_reason for event in events] == [None] * 9 + ["length"]
    events = list(Engine(inference, context_length=len(PROMPT) + 4).stream(Request("r", PROMPT, GREEDY)))
    assert [event.finish_reason for event in events] == [None] * 3 + ["context"]
    assert all(event.token is not None for event in events)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no tokens"), ([1] * 128, "128 tokens"), ([320], "outside the model's vocabulary"), ([-1], "outside")],
)
def test_impossible_prompts_are_refused(inference: InferenceModel, prompt: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(Engine(inference).stream(Request("r", prompt, GREEDY)))
    with pytest.raises(InputError, match=message):
        list(Engine(inference).run([Request("r", prompt, GREEDY)]))


def test_damaged_weights_are_not_talked_with(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder()
    with torch.no_grad():
        decoder.norm.weight[0] = float("nan")
    with pytest.raises(UnfitError, match="not finite"):
        list(Engine(InferenceModel(decoder, torch.float32)).stream(Request("r", PROMPT, GREEDY)))


@pytest.mark.parametrize("cached_keys", ["none", "rerotate", "published"])
def test_a_session_rereads_only_what_is_new(make_decoder: Callable[..., Decoder], cached_keys: str) -> None:
    scaling = None if cached_keys == "none" else RopeScaling.model_validate({"cached_keys": cached_keys})
    model = InferenceModel(make_decoder(rope_scaling=scaling), torch.float32)
    engine, session = Engine(model), Engine(model).new_session()
    first = [event.token for event in engine.stream(Request("1", PROMPT, GREEDY), session)]
    longer = [*PROMPT, *first, 9, 50, 51]
    kept = session.reuse(longer)
    assert kept == (0 if cached_keys == "published" else len(PROMPT) + 9)  # the last token of an answer is unread
    found = [event.token for event in engine.stream(Request("2", longer, GREEDY), session)]
    assert found == tokens_of(engine, Request("2", longer, GREEDY))
    other = [PROMPT[0], 77, 78]
    found = [event.token for event in engine.stream(Request("3", other, GREEDY), session)]
    assert found == tokens_of(engine, Request("3", other, GREEDY))


def test_a_session_survives_an_answer_that_was_broken_off(
    inference: InferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, session = Engine(inference), Engine(inference).new_session()
    stream = engine.stream(Request("1", PROMPT, GREEDY), session)
    next(stream)
    with monkeypatch.context() as patch:  # the step grows the cache, then is interrupted
        patch.setattr(inference, "_attend", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    longer = [*PROMPT, 60, 61]
    found = [event.token for event in engine.stream(Request("2", longer, GREEDY), session)]
    assert found == tokens_of(engine, Request("2", longer, GREEDY))
