"""The official client against our server: every call that it has for what we serve."""

from __future__ import annotations

import json

import openai
import pytest

from anychip.serve.request import Request

from .conftest import Served

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "上海"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASK = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "anychip"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_is_what_the_engine_says(client: openai.OpenAI, served: Served) -> None:
    talker = served.service.talker
    found = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, seed=3, max_tokens=9)
    prompt = talker.encode_messages(ASK)
    sampling = talker.sampling.model_copy(update={"temperature": 0.0, "max_new_tokens": 9})
    request = Request("r", prompt, sampling, talker.stop_ids)
    tokens = [event.token for event in talker.engine.stream(request) if event.token is not None]
    assert found.choices[0].message.content == talker.tokenizer.decode(tokens)
    assert found.choices[0].finish_reason == ("length" if len(tokens) == 9 else "stop")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), len(tokens))


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": ASK, "seed": 5, "n": 3, "temperature": 1.3}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    texts, reasons, usage = ["", "", ""], [None, None, None], None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 3
    assert usage == whole.usage


def test_the_seed_decides(client: openai.OpenAI) -> None:
    def ask(seed: int | None) -> str | None:
        found = client.chat.completions.create(model="tiny", messages=ASK, seed=seed, temperature=1.5)
        return found.choices[0].message.content

    assert ask(1) == ask(1) != ask(2)
    assert ask(None) != ask(None)


def test_no_part_of_a_stop_string_comes_out(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": ASK, "seed": 7, "temperature": 1.0, "max_tokens": 60}
    text = client.chat.completions.create(**options).choices[0].message.content  # type: ignore[call-overload]
    stop = text[20:24]
    expected = text[: text.index(stop)]
    found = client.chat.completions.create(**options, stop=["never there", stop]).choices[0]  # type: ignore[call-overload]
    assert (found.message.content, found.finish_reason) == (expected, "stop")
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**options, stop=stop, stream=True)  # type: ignore[call-overload]
    ]
    assert "".join(pieces) == expected


def test_log_probabilities(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=ASK, seed=1, logprobs=True, top_logprobs=3, max_tokens=6, temperature=0
    ).choices[0]
    assert found.logprobs is not None and found.logprobs.content is not None
    assert len(found.logprobs.content) == 6
    for one in found.logprobs.content:
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob), "greedy takes the likeliest"
        assert len(one.top_logprobs) == 3
    streamed = []
    for chunk in client.chat.completions.create(
        model="tiny", messages=ASK, logprobs=True, top_logprobs=3, max_tokens=6, temperature=0, stream=True
    ):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [one.token for one in streamed] == [one.token for one in found.logprobs.content]


def test_completions_with_echo_and_prompt_log_probabilities(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny", prompt=["the cat sat", "on"], echo=True, logprobs=2, max_tokens=0, temperature=0
    )
    assert [choice.text for choice in found.choices] == ["the cat sat", "on"]
    first = found.choices[0].logprobs
    assert first is not None and first.tokens is not None and first.token_logprobs is not None
    assert "".join(first.tokens) == "the cat sat"
    assert first.token_logprobs[0] is None
    assert all(value is not None and value < 0 for value in first.token_logprobs[1:])
    assert found.usage is not None and found.usage.completion_tokens == 0


def test_completions_stream_and_take_tokens(client: openai.OpenAI, served: Served) -> None:
    options = {"model": "tiny", "prompt": "the cat", "seed": 2, "n": 2, "max_tokens": 8}
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    texts = ["", ""]
    for chunk in client.completions.create(**options, stream=True):  # type: ignore[call-overload]
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    ids = served.service.talker.tokenizer.encode("the cat")
    assert client.completions.create(**{**options, "prompt": ids}).choices[0].text == texts[0]  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="control tokens"):
        client.completions.create(model="tiny", prompt=[2, 4])


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called_as_its_schema_says(client: openai.OpenAI, stream: bool) -> None:
    options = {"model": "tiny", "messages": ASK, "tools": [WEATHER], "seed": 4, "max_tokens": 400}
    choice = {"type": "function", "function": {"name": "weather"}}
    if stream:
        calls, reason = [], None
        for chunk in client.chat.completions.create(**options, tool_choice=choice, stream=True):  # type: ignore[call-overload]
            calls += chunk.choices[0].delta.tool_calls or []
            reason = chunk.choices[0].finish_reason or reason
    else:
        found = client.chat.completions.create(**options, tool_choice=choice).choices[0]  # type: ignore[call-overload]
        calls, reason = found.message.tool_calls, found.finish_reason
        assert found.message.content is None
    assert reason == "tool_calls"
    assert [call.function.name for call in calls] == ["weather"]
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "上海")


def test_an_answer_follows_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["animal", "legs"],
        "additionalProperties": False,
    }
    found = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        n=3,
        temperature=1.5,
        max_tokens=300,
        response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}},
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        record = json.loads(choice.message.content or "")
        assert set(record) == {"animal", "legs"} and record["legs"] in range(10)


def test_a_conversation_with_tools_goes_on(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    found = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "how is it?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},  # type: ignore[list-item]
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        tools=[WEATHER],  # type: ignore[list-item]
        max_tokens=4,
    )
    assert found.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 9}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"n": "1"}, "n"),
        ({"temperature": True}, "temperature"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"extra_body": {"chat_template_kwargs": {}}}, "chat_template_kwargs"),
        ({"extra_body": {"prompt_embeds": "x"}}, "prompt_embeds"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client: openai.OpenAI, fields: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=ASK, **fields)  # type: ignore[call-overload]
    assert str(caught.value.param).startswith(param)
    assert caught.value.type == "invalid_request_error"


def test_pictures_and_urls_are_refused(client: openai.OpenAI) -> None:
    picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [picture]}])  # type: ignore[list-item]


def test_a_prompt_beyond_the_context_is_refused(client: openai.OpenAI) -> None:
    for text in ("猫 " * 2000, "x" * 900_000):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}])
        assert caught.value.code == "context_length_exceeded"
