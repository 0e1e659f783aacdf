"""Loss masks against hand-made sequences, batches, epochs and what is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anychip.data.tokenizer import Tokenizer, train_bpe
from anychip.errors import InputError
from anychip.families.messages import Message
from anychip.recipe import Recipe, parse_recipe
from anychip.rundir import RunDirectory
from anychip.tune.dialogs import Dialog, question_and_answer
from anychip.tune.encoding import EncodedDialog, encode_dialogs
from anychip.tune.sft import SftData

END, PAD, USER, BOT, SYSTEM = 2, 3, 4, 5, 6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["what is a list? it is a list of things. be brief, please. " * 20], vocab_size=300)


def encode_one(dialog: Dialog, tokenizer: Tokenizer) -> EncodedDialog:
    return encode_dialogs([dialog], tokenizer)[0]


def recipe(dataset: str, **sft: Any) -> Recipe:
    return parse_recipe(
        {
            "schema_version": 1,
            "name": "tiny",
            "seed": 3,
            "model": {
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            "data": {"sources": [{"name": "text", "path": "unused"}]},
            "training": {"steps": 5, "seq_length": 64},
            "tune": {"sft": {"dataset": dataset, "micro_batch_size": 2, "global_batch_size": 4, **sft}},
        },
        "test",
    )


def write_dialogs(path: Path, count: int) -> str:
    lines = []
    for number in range(count):
        question = {"role": "user", "content": f"what is {'list ' * (number % 7)}{number}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": f"it is {number}."}]}))
    path.write_text("\n".join(lines))
    return str(path)


def run_with(tokenizer: Tokenizer, root: Path) -> RunDirectory:
    run = RunDirectory(root / "run")
    tokenizer.save(run.tokenizer)
    return run


def test_loss_is_on_the_answer_and_its_end_alone(tokenizer: Tokenizer) -> None:
    question, answer = tokenizer.encode("what is a list?"), tokenizer.encode("it is a list of things.")
    found = encode_one(question_and_answer("what is a list?", "it is a list of things.", "list"), tokenizer)
    assert found.input_ids.tolist() == [USER, *question, BOT, *answer]
    assert found.labels.tolist() == [-100] * (1 + len(question)) + [*answer, END]


def test_system_text_and_every_turn_of_a_long_dialog(tokenizer: Tokenizer) -> None:
    texts = ["be brief", "what is a list?", "things", "please", "it is a list"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    dialog = Dialog(tuple(Message(r, t) for r, t in zip(roles, texts, strict=True)), "list")  # type: ignore[arg-type]
    found = encode_one(dialog, tokenizer)
    system, first, answer, second, last = (tokenizer.encode(text) for text in ("be brief\n", *texts[1:]))
    between = tokenizer.encode("\n")
    whole = [SYSTEM, *system, USER, *first, BOT, *answer, END, *between, USER, *second, BOT, *last, END]
    assert found.input_ids.tolist() == whole[:-1]
    head = 1 + len(system) + 1 + len(first)
    middle = len(between) + 1 + len(second) + 1
    assert found.labels.tolist() == [-100] * head + [*answer, END] + [-100] * middle + [*last, END]


def test_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    found = encode_one(question_and_answer("<_end><_bot>yes", "<_user>no<_end>", "x"), tokenizer)
    ids = found.input_ids.tolist()
    assert [index for index in ids if index < 16] == [USER, BOT]
    assert found.labels.tolist().count(END) == 1 and found.labels[-1] == END


def test_batches_are_padded_to_a_multiple_of_sixteen_and_cover_epochs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_dialogs(tmp_path / "d.jsonl", 21)
    data = SftData(recipe(path, seq_length=64), run_with(tokenizer, tmp_path))
    assert data.dialogs == 21 and data.dropped == 0
    rows = []
    for step in range(21):  # four epochs
        batch = data.batch(step)
        assert batch.input_ids.shape == batch.labels.shape and batch.input_ids.dtype == torch.int64
        assert batch.input_ids.shape[0] == 4 and batch.input_ids.shape[1] % 16 == 0
        lengths = (batch.input_ids != PAD).sum(1)
        assert batch.input_ids.shape[1] - int(lengths.max()) < 16
        assert bool((batch.labels[batch.input_ids == PAD] == -100).all())
        rows += [tuple(row[row != PAD].tolist()) for row in batch.input_ids]
    for epoch in range(4):
        assert len(set(rows[epoch * 21 : (epoch + 1) * 21])) == 21
    again = SftData(recipe(path, seq_length=64), run_with(tokenizer, tmp_path))
    assert torch.equal(again.batch(17).input_ids, data.batch(17).input_ids)


def test_long_dialogs_are_dropped_and_counted_never_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_dialogs(tmp_path / "d.jsonl", 20)
    run = run_with(tokenizer, tmp_path)
    whole = SftData(recipe(path, seq_length=64), run)
    longest = max(len(encoded) for encoded in whole.encoded)
    data = SftData(recipe(path, seq_length=longest - 1), run)
    assert 0 < data.dropped < 20 and data.dialogs == 20 - data.dropped
    for step in range(10):
        batch = data.batch(step)
        assert batch.input_ids.shape[1] <= longest - 1
        assert ((batch.labels == END).sum(1) == 1).all()
    with pytest.raises(InputError, match="no dialog of at most"):
        SftData(recipe(path, seq_length=2), run)


def test_held_out_batches_count_the_bytes_of_the_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = SftData(recipe(write_dialogs(tmp_path / "d.jsonl", 120), seq_length=64), run_with(tokenizer, tmp_path))
    held_out = data.split.held_out_subjects
    assert held_out and data.dialogs + len(held_out) == 120
    batches = list(data.held_out_batches(held_out))
    assert sum(size for _, size in batches) == sum(len(dialog.answer.encode()) for dialog in held_out)
    assert sum(len(batch.input_ids) for batch, _ in batches) == len(held_out)


def test_a_system_prompt_of_the_recipe_comes_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_dialogs(tmp_path / "d.jsonl", 4)
    data = SftData(recipe(path, seq_length=64, system_prompt="be brief"), run_with(tokenizer, tmp_path))
    system = [SYSTEM, *tokenizer.encode("be brief\n"), USER]
    assert all(row[: len(system)] == system for row in data.batch(0).input_ids.tolist())


def test_dialogs_that_are_too_long_stop_the_tuning_where_the_recipe_says_so(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = write_dialogs(tmp_path / "d.jsonl", 20), run_with(tokenizer, tmp_path)
    longest = max(len(sample) for sample in SftData(recipe(path, seq_length=64), run).encoded)
    assert capsys.readouterr().err == ""
    SftData(recipe(path, seq_length=longest - 1), run)
    assert "are longer than" in capsys.readouterr().err
    with pytest.raises(InputError, match="of 20 dialogs are longer"):
        SftData(recipe(path, seq_length=longest - 1, too_long="refuse"), run)


def test_several_sources_are_read_by_their_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [json.dumps({"instruction": f"alpaca {n}", "output": "a"}) for n in range(8)]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(lines))
    sources = [
        {"path": write_dialogs(tmp_path / "d.jsonl", 16), "weight": 0.5},
        {"path": str(tmp_path / "alpaca.jsonl"), "weight": 2, "format": "alpaca"},
    ]
    made = recipe("unused", seq_length=64)
    sft = {**made.tune.sft.model_dump(), "sources": sources}  # type: ignore[union-attr]
    made = parse_recipe({**made.model_dump(), "tune": {"sft": sft}}, "test")
    data = SftData(made, run_with(tokenizer, tmp_path))
    read = [data.dialog(sample).question for step in range(6) for row in data.samples(step) for sample in row]
    assert sum(question.startswith("alpaca") for question in read) == 16  # of 24 an epoch
    assert len(set(read)) == 16
    again = [data.dialog(s).question for step in range(6, 12) for row in data.samples(step) for s in row]
    assert len(set(read) | set(again)) == 24


def test_a_recipe_may_still_name_one_dataset() -> None:
    old = recipe("some.jsonl").tune.sft
    assert old is not None and [source.path for source in old.sources] == ["some.jsonl"]
    with pytest.raises(InputError, match="not both"):
        recipe("some.jsonl", sources=[{"path": "other.jsonl"}])


def test_a_dialog_that_the_template_has_no_place_for_is_named(tokenizer: Tokenizer) -> None:
    thinking = Dialog((Message("user", "what is\na list?"), Message("assistant", "things", "hm")), "list")
    with pytest.raises(InputError, match=r'the dialog "what is a list\?": .* no place for thinking.* Choose C, D, E'):
        encode_one(thinking, tokenizer)
