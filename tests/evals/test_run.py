"""`evaluate_run` on a tiny prepared corpus: same text for everyone, what was read once, numbers that add up."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from anychip.data.loader import TrainingData
from anychip.data.prepare import prepare_data
from anychip.data.tokenizer import load_tokenizer
from anychip.evals import run as evaluation
from anychip.evals.training_text import read_training_text
from anychip.model.decoder import Decoder
from anychip.model.init import init_parameters
from anychip.recipe import Recipe, parse_recipe
from anychip.rundir import RunDirectory

VOCABULARY, SEQ_LENGTH, BATCH = 320, 32, 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Recipe]:
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    words = ["value", "returns", "the", "list", "größe", "中文", "of", "names", "(self)", "\n    "]
    (root / "texts").mkdir()
    for number in range(30):
        text = " ".join(rng.choice(words, 120)) + f"\ndocument {number} {rng.integers(10**9)}\n"
        (root / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    recipe = parse_recipe(
        {
            "schema_version": 1,
            "name": "tiny",
            "model": {
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            "data": {
                "sources": [{"name": "text", "path": str(root / "texts")}],
                "validation_fraction": 0.2,
                "dedup": {"enabled": False},
                "executor": {"tasks": 1},
                "workers": 1,
            },
            "training": {"steps": 5, "seq_length": SEQ_LENGTH, "micro_batch_size": BATCH, "global_batch_size": BATCH},
        },
        "test",
    )
    run = RunDirectory(root / "run")
    prepare_data(recipe, run)
    return run, recipe


def test_training_text_is_every_sample_that_was_read_once(prepared: tuple[RunDirectory, Recipe]) -> None:
    run, recipe = prepared
    data = TrainingData(run, recipe)
    batches = [data.batch(step) for step in range(5)]
    rows = [torch.cat([batch.input_ids[:, :1], batch.labels], dim=1).tolist() for batch in batches]
    read = {tuple(row) for batch in rows for row in batch}
    whole = {row for row in read if -100 not in row}
    found = read_training_text(run, recipe, 5, max_tokens=10**9)
    assert {tuple(row) for row in found.rows.tolist()} == whole
    assert found.tokens == found.distinct_tokens == len(whole) * SEQ_LENGTH

    epochs = read_training_text(run, recipe, 10_000, max_tokens=10**9)
    stream = np.concatenate([c.tokens(0, c.token_count // SEQ_LENGTH * SEQ_LENGTH) for c in data.corpora])
    assert np.array_equal(epochs.rows[:, 1:].ravel(), stream)
    tokenizer = load_tokenizer(run.tokenizer)
    assert epochs.text(tokenizer).decode() == tokenizer.decode(stream.tolist())
    thinned = read_training_text(run, recipe, 10_000, max_tokens=len(stream) // 3)
    assert thinned.tokens <= len(stream) // 3 and thinned.distinct_tokens == len(stream)


def test_everyone_scores_the_same_held_out_text(
    prepared: tuple[RunDirectory, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = prepared
    model = Decoder(recipe.model)
    init_parameters(model, recipe.model, seed=0)
    torch.nn.init.zeros_(model.lm_head.weight)  # a uniform model: log2(vocabulary) bits a token
    monkeypatch.setattr(evaluation, "load_pretrained", lambda run, recipe: (model, 40))
    record = evaluation.evaluate_run(run, recipe)
    assert json.loads(run.evaluation.read_text()) == record

    held_out = record["held_out"]
    from anychip.data.validation import validation_texts

    text = "".join(text for _, text in validation_texts(run, recipe, recipe.eval.max_tokens)).encode()
    assert held_out["utf8_bytes"] == len(text) and held_out["sha256"] == hashlib.sha256(text).hexdigest()
    uniform = np.log2(VOCABULARY) * held_out["tokens"] / len(text)
    assert record["model"]["bits_per_byte"] == pytest.approx(uniform, rel=1e-6)
    assert record["step"] == 40
    assert 0 < record["ngram"]["bits_per_byte"] < uniform
    assert record["ngram"]["training_tokens"] == record["training_text"]["tokens"] > 0
    assert 0 < record["xz"]["primed"] < record["xz"]["cold"]


def test_baselines_are_left_out_when_the_recipe_says_so(
    prepared: tuple[RunDirectory, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = prepared
    model = Decoder(recipe.model)
    init_parameters(model, recipe.model, seed=0)
    monkeypatch.setattr(evaluation, "load_pretrained", lambda run, recipe: (model, 1))
    quiet = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"baselines": False})})
    assert not {"xz", "ngram"} & set(evaluation.evaluate_run(run, quiet))
