"""Preference losses and their gradients against the papers' formulas in fp64, computed without any of our code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sft import run_with

from anychip.data.batch import Batch
from anychip.data.tokenizer import Tokenizer, train_bpe
from anychip.errors import InputError
from anychip.families.messages import Message
from anychip.recipe import Recipe, parse_recipe
from anychip.train.objective import Head
from anychip.tune.dpo import DpoData, reference_log_probabilities
from anychip.tune.pairs import parse_pair, read_pairs
from anychip.tune.preference import Loss, Preference


def independent(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor, kind: Loss, beta: float
) -> torch.Tensor:
    """Pair by pair, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in range(len(labels) // 2):
        ratios = []
        for row in (2 * pair, 2 * pair + 1):
            tokens = [
                torch.log(torch.softmax(weight @ hidden[row, at], dim=0)[labels[row, at]])
                for at in range(labels.shape[1])
                if labels[row, at] != -100
            ]
            scale = len(tokens) if kind == "ipo" else 1
            ratios.append(torch.stack(tokens).sum() / scale - reference[row] / scale)
        h = ratios[0] - ratios[1]
        total = total + ((h - 1 / (2 * beta)) ** 2 if kind == "ipo" else torch.log1p(torch.exp(-beta * h)))
    return total


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [3, 512])
def test_losses_and_gradients_are_those_of_the_formulas(
    kind: Loss, dtype: torch.dtype, tolerance: float, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 7, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64) / 4
    labels = torch.randint(0, 50, (6, 7), generator=generator)
    labels[0, :4] = labels[3, 5:] = labels[4, 1:6] = -100
    reference = -15 - 5 * torch.rand(6, generator=generator, dtype=torch.float64)
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = independent(*exact, labels, reference, kind, 0.3)
    expected.backward()
    ours = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    loss = Preference(kind, 0.3).loss(Head(ours[1], chunk), ours[0], Batch(labels, labels, None, reference))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).abs().max() <= tolerance * theirs.grad.abs().max()


def test_a_frozen_head_gets_no_gradient_and_hidden_states_the_same() -> None:
    hidden, weight = torch.randn(2, 5, 8), torch.randn(20, 8)
    labels, reference = torch.randint(0, 20, (2, 5)), torch.tensor([-9.0, -8.0])
    gradients = []
    for learned in (True, False):
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(learned)
        Preference("dpo", 0.1).loss(Head(head, 4), states, Batch(labels, labels, None, reference)).backward()
        assert (head.grad is not None) == learned
        gradients.append(states.grad)
    assert gradients[0] is not None and gradients[1] is not None and torch.equal(gradients[0], gradients[1])


PROMPT = [{"role": "user", "content": "q"}]
FORMS: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": "good"}],
     "rejected": [{"role": "assistant", "content": "bad"}]},
    {"chosen": [*PROMPT, {"role": "assistant", "content": "good"}],
     "rejected": [*PROMPT, {"role": "assistant", "content": "bad"}]},
    {"messages": PROMPT, "chosen": {"role": "assistant", "content": "good"}, "rejected": {"content": "bad"}},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
     "rejected": {"from": "gpt", "value": "bad"}},
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    {"system": "", "dialog": PROMPT, "chosen": "good", "rejected": "bad"},
]  # fmt: skip


@pytest.mark.parametrize("record", FORMS)
def test_pairs_in_every_form(record: dict[str, Any]) -> None:
    pair = parse_pair(record, "auto", "here")
    assert pair.chosen.messages == (Message("user", "q"), Message("assistant", "good"))
    assert pair.rejected.messages == (Message("user", "q"), Message("assistant", "bad"))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "q", "chosen": "good"}, "no `chosen` and `rejected`"),
        ([], "no `chosen` and `rejected`"),
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "to itself"),
        ({"prompt": "q", "chosen": "", "rejected": "bad"}, "chosen.* no text"),
        ({"prompt": "q", "chosen": "good", "rejected": 3}, "rejected.* no answer"),
        ({"chosen": [*PROMPT, {"role": "assistant", "content": "good"}],
          "rejected": [{"role": "user", "content": "other"}, {"role": "assistant", "content": "bad"}]},
         "different prompts"),
        ({"prompt": 1, "chosen": "a", "rejected": "b"}, "here"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_pair_is_refused(record: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_pair(record, "auto", "here")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["what is a list? it is a list of things. be brief, please. " * 20], vocab_size=300)


def recipe(path: Path, **dpo: Any) -> Recipe:
    model = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    sources = [{"path": str(path)}]
    tune = {"dpo": {"sources": sources, "micro_batch_size": 2, "global_batch_size": 4, "seq_length": 64, **dpo}}
    data = {"sources": [{"name": "text", "path": "unused"}]}
    raw = {"schema_version": 1, "name": "tiny", "model": model, "data": data, "training": {"steps": 1}, "tune": tune}
    return parse_recipe(raw, "test")


def write_pairs(path: Path, count: int) -> Path:
    pairs = [
        {"prompt": f"what is {n}?", "chosen": f"it is {'a ' * (n % 5)}{n}", "rejected": "things"} for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


def test_batches_hold_pairs_side_by_side_and_learn_answers_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_pairs(tmp_path / "p.jsonl", 10)
    data = DpoData(recipe(path), run_with(tokenizer, tmp_path))
    assert [pair.chosen.question for pair in read_pairs(path)] == [f"what is {n}?" for n in range(10)]
    seen = []
    for step in range(5):
        batch, numbers = data.batch(step), data.numbers(step)
        seen += numbers
        for index, number in enumerate(numbers):
            for row, dialog in ((2 * index, data.pairs[number].chosen), (2 * index + 1, data.pairs[number].rejected)):
                labels = batch.labels[row]
                assert tokenizer.decode(labels[labels >= 0].tolist()) == dialog.answer
                assert int((labels >= 0).sum()) == len(tokenizer.encode(dialog.answer)) + 1
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))


def test_the_reference_is_computed_once_and_kept_for_these_weights_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run = run_with(tokenizer, tmp_path)
    data = DpoData(recipe(write_pairs(tmp_path / "p.jsonl", 10)), run)
    calls = []

    def compute(batch: Batch) -> torch.Tensor:
        calls.append(len(batch.labels))
        return -(batch.labels >= 0).sum(1).double()

    def ask(identity: str) -> torch.Tensor:
        return reference_log_probabilities(data, run, identity, compute, lambda flag: flag, writes=True)

    found = ask("one")
    assert calls == [8, 8, 8] and torch.equal(ask("one"), found) and calls == [8, 8, 8]
    ask("another")
    assert len(calls) == 6
    (run.dpo / "reference.safetensors").write_bytes(b"junk")
    assert torch.equal(ask("another"), found)
    data.remember_reference(found)
    for step in range(3):
        batch = data.batch(step)
        assert batch.reference is not None and torch.equal(batch.reference, -(batch.labels >= 0).sum(1).double())


def test_pairs_that_are_too_long_are_left_out_or_stop_the_tuning(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, run = write_pairs(tmp_path / "p.jsonl", 10), run_with(tokenizer, tmp_path)
    longest = max(len(row) for pair in DpoData(recipe(path), run).encoded for row in pair)
    assert len(DpoData(recipe(path, seq_length=longest - 1), run).pairs) < 10
    with pytest.raises(InputError, match="pairs are longer"):
        DpoData(recipe(path, seq_length=longest - 1, too_long="refuse"), run)
