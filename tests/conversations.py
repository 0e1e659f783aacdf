"""Random conversations of every kind, for tests; and a tokenizer that has TeleChat3's tags as control tokens."""

from __future__ import annotations

import json

from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from anychip.data.tokenizer import JsonTokenizer, Tokenizer, train_bpe
from anychip.families.messages import Message, ToolCall, tools_of
from anychip.tune.dialogs import Dialog

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<param_key>",
        "</param_key>", "<param_value>", "</param_value>")  # fmt: skip
TEXTS = st.sampled_from(
    ["hi", "你好", "what is 1+1?", "a\nb", "<_end>", "<_bot>no", "</think>x", "<tool_call>", "x</tool_response>y", "é"]
)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "城市"]), st.one_of(TEXTS, st.integers(), st.booleans()), max_size=2)
CALLS = st.builds(ToolCall.of, st.sampled_from(["add", "get_weather"]), ARGUMENTS)
TOOLS = tools_of([{"type": "function", "function": {"name": "add", "description": "加"}}, {"name": "get_weather"}])


def plain_tokenizer() -> Tokenizer:
    """Without tags: they are text."""
    return train_bpe(["what is a list? it is a list of things. be brief, please. 你好 " * 20], vocab_size=300)


def tagged_tokenizer() -> Tokenizer:
    plain = plain_tokenizer()
    assert isinstance(plain, JsonTokenizer)
    backend = Backend.from_str(plain.serialized)
    backend.add_special_tokens([AddedToken(tag, special=True) for tag in TAGS])
    roles = {"eos": "<_end>", "bos": "<_start>", "pad": "<_pad>", "unk": "<_unk>"}
    return JsonTokenizer(json.dumps(json.loads(backend.to_str())), roles)


@st.composite
def dialogs(draw: st.DrawFn, *, system: bool = True, tools: bool = True, thinking: bool = True) -> Dialog:
    """A whole dialog of one to three questions."""
    messages = [Message("system", draw(TEXTS))] if system and draw(st.booleans()) else []

    def answer(calls: bool) -> Message:
        thought = draw(TEXTS) if thinking and draw(st.booleans()) else ""
        wanted = draw(st.lists(CALLS, min_size=1, max_size=2)) if calls else []
        return Message("assistant", draw(TEXTS), thought, tuple(wanted))

    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXTS)))
        if tools and draw(st.booleans()):
            called = answer(calls=True)
            messages.append(called)
            messages += [Message("tool", draw(TEXTS)) for _ in called.tool_calls]
        messages.append(answer(calls=False))
    offered = TOOLS if any(message.tool_calls for message in messages) else ()
    return Dialog(tuple(messages), "", offered)


def as_openai(message: Message) -> dict[str, object]:
    """The same message in OpenAI's words."""
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    if message.thinking:
        turn["reasoning_content"] = message.thinking
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in message.tool_calls
        ]
    return turn
