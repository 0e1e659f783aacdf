"""Generation for scripts: prompts from files, results in order, the same for the same seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anychip.errors import InputError
from anychip.serve import generate as generate_module
from anychip.serve.generate import Prompt, complete, generate, read_prompts
from anychip.serve.talker import Talker, replace_sampling


@pytest.fixture
def loaded(make_tiny_talker: Callable[..., Talker], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that loads as the tiny model."""
    monkeypatch.setattr(generate_module, "open_talker", lambda path, sampling, weights: make_tiny_talker(**sampling))
    return Path("a-model")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_come_in_the_order_of_the_prompts(make_tiny_talker: Callable[..., Talker]) -> None:
    talker = make_tiny_talker(temperature=1.3)
    prompts = [Prompt(str(i), "the cat sat " * (1 + i % 3)) for i in range(11)]
    results = list(complete(talker, prompts, samples=2, seed=5))
    assert [(result.id, result.sample) for result in results] == [(str(i), s) for i in range(11) for s in range(2)]
    alone = next(complete(talker, prompts[7:8], samples=1, seed=5))
    assert alone == results[14]
    assert results[14].text != results[15].text
    assert next(complete(talker, prompts[7:8], seed=6)).text != alone.text
    assert all(result.finish_reason in ("stop", "length") for result in results)


def test_json_lines(loaded: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "猫?"}]
    prompts.write_text(
        f'{{"id": "a", "prompt": "the cat"}}\n\n{json.dumps({"messages": messages})}\n', encoding="utf-8"
    )
    out = tmp_path / "deep" / "out.jsonl"
    generate(loaded, file=prompts, output=out, format="jsonl", samples=2, seed=1)
    assert [(line["id"], line["sample"]) for line in lines(out)] == [("a", 0), ("a", 1), ("3", 0), ("3", 1)]
    assert set(lines(out)[0]) == {"id", "sample", "text", "finish_reason", "prompt_tokens", "tokens"}
    before = out.read_bytes()
    generate(loaded, file=prompts, output=out, format="jsonl", samples=2, seed=1)
    assert out.read_bytes() == before


def test_text_to_standard_output(loaded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(loaded, prompt="the cat", sampling={"temperature": 0})
    raw = capsys.readouterr().out
    generate(loaded, prompt="the cat", chat=True, system="the mat", sampling={"temperature": 0})
    asked = capsys.readouterr().out
    assert raw.endswith("\n")
    assert raw != asked


def test_a_conversation_is_given_its_system_prompt_once(make_tiny_talker: Callable[..., Talker]) -> None:
    own = Prompt("a", messages=({"role": "system", "content": "own"}, {"role": "user", "content": "x"}))
    assert generate_module._as_conversation(own, "other") == own
    text = generate_module._as_conversation(Prompt("a", "x"), "other")
    assert [message["content"] for message in text.messages] == ["other", "x"]


def test_a_text_file_is_one_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text('{"prompt": "not JSON here"}\nsecond line', encoding="utf-8")
    assert read_prompts(path) == [Prompt("prompt.txt", '{"prompt": "not JSON here"}\nsecond line')]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: is not valid JSON"),
        (b'{"text": "a"}', "line 1: has neither"),
        (b'{"prompt": 3}', "has neither"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "has neither"),
        (b'{"messages": [{"role": "bot", "content": "b"}]}', "system, user, assistant"),
        (b'{"messages": ["b"]}', "has a message"),
        (b"[1]", "has neither"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "the same id"),
        (b"\xff\xfe", "not text in UTF-8"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_what_cannot_be_asked_for_is_refused_before_loading(tmp_path: Path) -> None:
    for arguments in [{}, {"prompt": "a", "file": tmp_path / "b"}, {"prompt": "a", "samples": 0}]:
        with pytest.raises(InputError):
            generate(tmp_path / "no-model", **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be read"):
        generate(tmp_path / "no-model", file=tmp_path / "none.jsonl")


def test_equal_samples_are_refused(loaded: Path) -> None:
    with pytest.raises(InputError, match="alike at temperature 0"):
        generate(loaded, prompt="a", samples=2, sampling={"temperature": 0})


def test_an_empty_prompt_is_refused(loaded: Path) -> None:
    with pytest.raises(InputError, match="no tokens"):
        generate(loaded, prompt="")


def test_a_bad_prompt_leaves_no_output(loaded: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="context"):
        generate(loaded, prompt="猫" * 300, output=tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []


def test_every_sampling_field_can_be_replaced(make_tiny_talker: Callable[..., Talker]) -> None:
    talker = make_tiny_talker(temperature=0, top_k=3, top_p=0.5, repetition_penalty=1.1, max_new_tokens=2)
    assert talker.sampling == replace_sampling(talker.sampling, {})
    assert next(complete(talker, [Prompt("a", "the")])).tokens <= 2
