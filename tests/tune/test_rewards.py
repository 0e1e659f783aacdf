"""What rewards give for right, wrong and hostile answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anychip.errors import InputError
from anychip.recipe.schema import RewardConfig
from anychip.tune.rewards import Answered, make_reward


def score(answered: Answered, **config: Any) -> float:
    return make_reward([RewardConfig(**config)]).all(answered)[0]


@pytest.mark.parametrize(("answer", "reference", "expected"), [(" 4\n", "4", 1), ("44", "4", 0), ("", "", 0)])
def test_exact(answer: str, reference: str, expected: float) -> None:
    assert score(Answered(answer, "2 + 2?", reference), kind="exact") == expected


@pytest.mark.parametrize(("answer", "expected"), [("<think>a\nb</think>4", 1), ("4", 0), ("x<think></think>4", 0)])
def test_a_pattern_must_match_the_whole_answer(answer: str, expected: float) -> None:
    assert score(Answered(answer, ""), kind="pattern", pattern="<think>.*</think>[0-9]+") == expected


def test_a_pattern_that_takes_for_ever_is_no_match() -> None:
    assert score(Answered("a" * 5000 + "b", ""), kind="pattern", pattern="((a|a)*c|(a+)+$)") == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("def add(a, b): return a + b", 1),
        ("Like this:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1),
        ("def add(a, b): return a - b", 0),
        ("def add(a, b:", 0),
        ("import os; os._exit(0)", 0),
        ("raise SystemExit(0)", 0),
        ("", 0),
    ],
)
def test_code_must_pass_its_tests_to_the_last_line(answer: str, expected: float) -> None:
    answered = Answered(answer, "add", "", "assert add(2, 3) == 5\nassert add(0, 0) == 0")
    assert score(answered, kind="code") == expected


def test_code_without_tests_earns_nothing() -> None:
    assert score(Answered("pass", ""), kind="code") == 0


def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(answered): return 1 / (1 + len(answered.answer))\ndef broken(answered): return 'x'\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert score(Answered("abc", ""), kind="custom", function="my_rewards:short") == 0.25
    with pytest.raises(InputError, match="not a finite number"):
        score(Answered("abc", ""), kind="custom", function="my_rewards:broken")
    for name, says in (("my_rewards:none", "cannot be imported"), ("my_rewards:number", "not a function"),
                       ("no_such_module:f", "cannot be imported"), ("my_rewards", "module:function")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            score(Answered("abc", ""), kind="custom", function=name)


def test_rewards_add_up_by_weight() -> None:
    reward = make_reward(
        [RewardConfig(kind="exact", weight=2.0), RewardConfig(kind="pattern", pattern="4", weight=-0.5)]
    )
    scores = reward.all(Answered("4", "", "4"))
    assert scores == [1, 1] and reward.total(scores) == 1.5


@pytest.mark.parametrize(
    "config",
    [{"kind": "pattern"}, {"kind": "exact", "pattern": "x"}, {"kind": "custom"}, {"kind": "maths", "function": "a:b"}],
)
def test_fields_belong_to_their_kind(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig(**config)


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(InputError, match="no regular expression"):
        make_reward([RewardConfig(kind="pattern", pattern="(")])


def test_maths_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match="math-verify, which is not installed"):
        make_reward([RewardConfig(kind="maths")])


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The result is $\\frac{1}{2}$.", "0.5", 1),
        ("So x = \\boxed{2\\sqrt{2}}", "$\\sqrt{8}$", 1),
        ("It is 7", "8", 0),
        ("no idea", "8", 0),
        ("7", "", 0),
    ],
)
def test_maths_compares_values(answer: str, reference: str, expected: float) -> None:
    pytest.importorskip("math_verify")
    assert score(Answered(answer, "", reference), kind="maths") == expected
