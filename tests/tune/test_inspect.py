"""What is shown of a sample is the text that is read, with exactly the learned part marked."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from test_preference import recipe as pair_recipe
from test_preference import write_pairs
from test_sft import recipe, run_with

from anychip.data.tokenizer import Tokenizer, train_bpe
from anychip.errors import InputError
from anychip.tune.inspect import show_sample


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["what is a list? it is a list of things. be brief, please. " * 20], vocab_size=300)


def written(path: Path, answer: str) -> str:
    turns = [{"role": "user", "content": "what [is] it?"}, {"role": "assistant", "content": answer}]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    return str(path)


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    colours = "truecolor" if terminal else None
    return Console(file=out, force_terminal=terminal, color_system=colours, width=80, _environ={}), out


def test_marks_where_there_are_no_colours(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = recipe(written(tmp_path / "d.jsonl", "a [bold]list\x1b[31m你好"), seq_length=128)
    plain, out = console(terminal=False)
    show_sample(made, run_with(tokenizer, tmp_path), "sft", 0, 1, plain)
    text = out.getvalue()
    assert "step 0, sample 1 of 4" in text and "template B" in text and "d.jsonl" in text
    assert "<_user>what [is] it?<_bot>{+a [bold]list\ufffd[31m你好<_end>+}" in text
    assert text.count("<_user>") == 1 and "\x1b" not in text


def test_colours_on_a_terminal(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = recipe(written(tmp_path / "d.jsonl", "a list"), seq_length=64, packing=True)
    coloured, out = console(terminal=True)
    show_sample(made, run_with(tokenizer, tmp_path), "sft", 2, None, coloured)
    assert "\x1b[1;32ma list<_end>" in out.getvalue() and "{+" not in out.getvalue()


def test_pairs_show_both_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain, out = console(terminal=False)
    show_sample(pair_recipe(write_pairs(tmp_path / "p.jsonl", 4)), run_with(tokenizer, tmp_path), "dpo", 0, 0, plain)
    assert "p.jsonl, chosen" in out.getvalue() and "{+things<_end>+}" in out.getvalue()


def test_a_sample_that_is_none_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = recipe(written(tmp_path / "d.jsonl", "a list"), seq_length=64)
    with pytest.raises(InputError, match="no sample 4"):
        show_sample(made, run_with(tokenizer, tmp_path), "sft", 0, 4, console(terminal=False)[0])
