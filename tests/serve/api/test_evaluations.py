"""Task files over one tiny model: by the engine and by the server, by our runner and by lm-eval, with equal results.

The last needs lm-eval: pip install --target /tmp/lm-eval lm-eval; PYTHONPATH=/tmp/lm-eval pytest ...
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from anychip.errors import InputError
from anychip.evals.language_model import LanguageModel
from anychip.serve.client import ServerModel
from anychip.serve.evaluate import described, evaluate_tasks
from anychip.serve.scoring import EngineModel
from anychip.serve.talker import make_talker

from ..conftest import Loaded
from .conftest import Served, tiny_decoder

WORDS = ["the cat", "sat", "on the mat", "猫坐在", "weather", "Paris"]
PAIRS = [("the cat", " sat"), ("the cat ", "sat on"), ("the", " cat sat on the mat, 猫"), ("猫坐", "在垫子上")]


@pytest.fixture(scope="module")
def model(served: Served) -> EngineModel:
    """The served model once more, in an engine of its own."""
    talker = served.service.talker
    loaded = Loaded(tiny_decoder(2048), talker.tokenizer, talker.sampling)
    return EngineModel(make_talker(loaded, {}, max_batch=4, prefill_tokens=64), "tiny")


@pytest.fixture(scope="module")
def tasks(model: EngineModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A choice task, and a generation task whose answers are the model's own for a third of its documents."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"q": f"{one} {other}", "choices": WORDS[:4], "gold": (place + 2 * number) % 4, "answer": WORDS[number]}
        for place, one in enumerate(WORDS)
        for number, other in enumerate(WORDS)
    ]
    said = model.generate([str(document["q"]) for document in documents[::3]], [" ", "a"], 6)
    for document, answer in zip(documents[::3], said, strict=True):
        document["answer"] = answer
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "d.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = {
        "task": "tiny_choice", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in
                        ("acc", "acc_norm")],
    }  # fmt: skip
    generation = {
        "task": "tiny_generation", "output_type": "generate_until", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [" ", "a"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    paths = []
    for task in (choice, generation):
        paths.append(folder / f"{task['task']}.yaml")
        paths[-1].write_text(yaml.safe_dump({**shared, **task}))
    return paths


def test_likelihoods_are_those_of_the_whole_forward_pass(model: EngineModel, served: Served) -> None:
    """Against the training decoder, token by token."""
    decoder, tokenizer = tiny_decoder(2048), served.service.talker.tokenizer
    for (context, continuation), found in zip(PAIRS, model.likelihoods(PAIRS), strict=True):
        moved = context.rstrip()
        ids, start = tokenizer.encode(context + continuation), len(tokenizer.encode(moved))
        with torch.no_grad():
            logprobs = decoder.logits(decoder(torch.tensor([ids]))[0]).double().log_softmax(-1)
        expected = sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))
        greedy = all(int(logprobs[at - 1].argmax()) == ids[at] for at in range(start, len(ids)))
        assert found.log_probability == pytest.approx(expected, rel=1e-4) and found.greedy == greedy


def test_an_empty_context_is_the_end_of_a_document(model: EngineModel, served: Served) -> None:
    decoder, tokenizer = tiny_decoder(2048), served.service.talker.tokenizer
    ids = [tokenizer.eos_id, *tokenizer.encode("the cat")]
    with torch.no_grad():
        logprobs = decoder.logits(decoder(torch.tensor([ids]))[0]).double().log_softmax(-1)
    expected = sum(float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids)))
    assert model.likelihoods([("", "the cat")])[0].log_probability == pytest.approx(expected, rel=1e-4)


def test_the_server_says_what_the_engine_says(model: EngineModel, served: Served) -> None:
    server = ServerModel(f"{served.url}/v1")
    for ours, theirs in zip(model.likelihoods(PAIRS), server.likelihoods(PAIRS), strict=True):
        assert theirs.log_probability == pytest.approx(ours.log_probability, rel=1e-4) and theirs.greedy == ours.greedy
    prompts = ["the cat", "weather", "猫"]
    for stops in ([], [" "], ["a", "t", "e", "h", "s"]):
        assert server.generate(prompts, stops, 8) == model.generate(prompts, stops, 8)
    with pytest.raises(InputError, match="empty context"):
        server.likelihoods([("", "the cat")])
    chat, asked = ServerModel(f"{served.url}/v1", chat=True), EngineModel(model._talker, "tiny", chat=True)
    assert chat.generate(prompts, [" "], 8) == asked.generate(prompts, [" "], 8)
    with pytest.raises(InputError, match="no log-likelihood"):
        chat.likelihoods(PAIRS)


def test_no_server_is_a_mistake_of_the_user() -> None:
    with pytest.raises(InputError, match="does not answer"):
        ServerModel("http://127.0.0.1:9/v1")


def test_tasks_give_the_same_by_engine_and_server(model: EngineModel, served: Served, tasks: list[Path]) -> None:
    ours, theirs = (evaluate_tasks(one, tasks, limit=12) for one in (model, ServerModel(f"{served.url}/v1")))
    assert [record["metrics"] for record in ours] == [record["metrics"] for record in theirs]
    assert "tiny_choice | acc 0." in described(ours[0]) and "12 documents" in described(ours[0])


@pytest.mark.parametrize("behind_server", [False, True])
def test_lm_eval_finds_what_our_runner_finds(
    model: EngineModel, served: Served, tasks: list[Path], behind_server: bool
) -> None:
    pytest.importorskip("lm_eval")
    asked: LanguageModel = ServerModel(f"{served.url}/v1") if behind_server else model
    ours, theirs = (evaluate_tasks(asked, tasks, harness=harness) for harness in (False, True))
    for one, other in zip(ours, theirs, strict=True):
        assert other["runner"] == "lm-eval" and one["documents"] == other["documents"]
        assert one["metrics"].keys() == other["metrics"].keys()
        for metric, found in one["metrics"].items():
            assert other["metrics"][metric]["value"] == pytest.approx(found["value"], abs=1e-12)
            assert other["metrics"][metric]["standard_error"] == pytest.approx(found["standard_error"], abs=1e-12)
        assert any(found["value"] not in (0, 1) for found in one["metrics"].values())


def test_without_lm_eval_it_is_named(model: EngineModel, tasks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(InputError, match="lm-eval cannot be imported"):
        evaluate_tasks(model, tasks, harness=True)
