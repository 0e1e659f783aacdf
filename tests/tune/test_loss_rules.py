"""Which tokens are learned, against a second statement of the rules that knows only strings and positions."""

from __future__ import annotations

import pytest
from conversations import dialogs, plain_tokenizer, tagged_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.data.batch import IGNORE_LABEL
from anychip.data.tokenizer import Tokenizer
from anychip.families.templates import STYLES, TEMPLATES, Template, render
from anychip.tune.dialogs import Dialog
from anychip.tune.encoding import EncodedDialog, Encoding, LossOn, encode_dialogs

TOKENIZERS = {"tags are text": plain_tokenizer(), "tags are ids": tagged_tokenizer()}
USER, BOT, END = 4, 5, 2


@st.composite
def mixtures(draw: st.DrawFn, template: Template) -> list[Dialog]:
    style = STYLES[template]
    one = dialogs(system=style.system != "none", tools=style.tools is not None, thinking=style.think is not None)
    return draw(st.lists(one, min_size=1, max_size=3))


def prompt_ids(dialog: Dialog, turns: int, template: Template, tokenizer: Tokenizer, thinking: bool) -> list[int]:
    parts = render(
        dialog.messages[:turns], tokenizer.special_tokens, template, dialog.tools, prompt=True, thinking=thinking
    )
    return tokenizer.encode_parts(part.value for part in parts)


def learned_positions(sample: EncodedDialog) -> list[int]:
    """Positions of the learned tokens in the whole sequence."""
    return [position + 1 for position, label in enumerate(sample.labels.tolist()) if label != IGNORE_LABEL]


def whole(sample: EncodedDialog, last: int = END) -> list[int]:
    """Input ids and the token that the last label is."""
    return [*sample.input_ids.tolist(), last]


def naive_torch(ids: list[int]) -> list[int]:
    """The published rule: from <_bot> to <_end>, both included, and each <_user>; nothing predicts the first token."""
    learned, answering = [], False
    for position, token in enumerate(ids):
        answering = answering or token == BOT
        if (answering or token == USER) and position:
            learned.append(position)
        answering = answering and token != END
    return learned


def naive_answer(ids: list[int]) -> list[int]:
    """Everything behind a <_bot>, up to its <_end> included."""
    learned, answering = [], False
    for position, token in enumerate(ids):
        if answering:
            learned.append(position)
        if token in (BOT, END):
            answering = token == BOT
    return learned


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["A", "B"])
@pytest.mark.parametrize(("loss_on", "rule"), [("answer", naive_answer), ("telechat-torch", naive_torch)])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tools_and_turns_of_templates_without_thinking(
    kind: str, template: Template, loss_on: LossOn, rule, data
) -> None:  # type: ignore[no-untyped-def]
    found = encode_dialogs(data.draw(mixtures(template)), TOKENIZERS[kind], Encoding(template, loss_on))
    for sample in found:
        ids = whole(sample)
        assert learned_positions(sample) == rule(ids)
        assert [ids[p] for p in learned_positions(sample)] == [label for label in sample.labels.tolist() if label >= 0]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_answer_is_learned_once_behind_the_prompt_that_asks_for_it(kind, template, data) -> None:  # type: ignore[no-untyped-def]
    """In each template, thinking included: what is learned are the tokens that a model would have to generate."""
    tokenizer, mixture = TOKENIZERS[kind], data.draw(mixtures(template))
    expected: list[tuple[int, tuple[int, ...], int]] = []
    for number, dialog in enumerate(mixture):
        for turn, message in enumerate(dialog.messages):
            if message.role == "assistant":
                thinks = bool(message.thinking)
                parts = render(
                    dialog.messages[: turn + 1], tokenizer.special_tokens, template, dialog.tools, prompt=False
                )
                ids = tokenizer.encode_parts(part.value for part in parts)
                prompt = prompt_ids(dialog, turn, template, tokenizer, thinks)
                assert ids[: len(prompt)] == prompt
                expected.append((number, tuple(prompt), len(ids) - len(prompt)))
    found: list[tuple[int, tuple[int, ...], int]] = []
    for sample in encode_dialogs(mixture, tokenizer, Encoding(template)):
        ids, positions = whole(sample), learned_positions(sample)
        starts = [p for p in positions if p - 1 not in positions]
        for start in starts:
            length = next(n for n in range(1, len(ids) - start + 1) if start + n not in positions)
            found.append((sample.dialog, tuple(ids[:start]), length))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_loss_on_all_learns_each_token_but_the_first(template: Template, data: st.DataObject) -> None:
    mixture = data.draw(mixtures(template))
    simple = [Dialog(tuple(m for m in d.messages if not m.thinking), "", d.tools) for d in mixture[:1]]
    simple = [d for d in simple if d.messages and d.messages[-1].role == "assistant"]
    for sample in encode_dialogs(simple, TOKENIZERS["tags are ids"], Encoding(template, "all")):
        assert learned_positions(sample) == list(range(1, len(sample) + 1))


def test_parity_doubles_the_line_feed_of_system_text_and_names_telechat() -> None:
    tokenizer = TOKENIZERS["tags are ids"]
    from anychip.families.messages import Message

    turns = (Message("user", "q"), Message("assistant", "a"))
    given = Dialog((Message("system", "s\n"), *turns), "")
    texts = {
        parity: [
            tokenizer.decode(sample.input_ids.tolist())
            for sample in encode_dialogs([given, Dialog(turns, "")], tokenizer, Encoding("B", parity=parity))
        ]
        for parity in (False, True)
    }
    assert texts[False] == ["s\nqa", "qa"]
    assert texts[True][0] == "s\n\nqa" and texts[True][1].startswith("你是中国电信")
