"""A recipe that grows is planned model by model, and each in its own words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from anychip.cli import main
from anychip.errors import InputError
from anychip.plan.models import amount, model_stages
from anychip.plan.saved import predicted_rate
from anychip.recipe import load_recipe

ROOT = Path(__file__).parents[2]
GROWING = ROOT / "recipes" / "teleflm-1t.yaml"
CLUSTER = str(ROOT / "clusters" / "ascend-910b-8192.yaml")
SMALL: dict[str, Any] = {
    "schema_version": 1,
    "name": "small",
    "model": {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
              "num_attention_heads": 8, "num_key_value_heads": 8},
    "data": {"sources": [{"name": "corpus", "path": "corpus/packed", "format": "megatron"}]},
    "training": {"seq_length": 2048, "micro_batch_size": 1, "global_batch_size": 32, "steps": 1000},
    "parallel": {"tensor_parallel": 2, "data_parallel_shard": 4},
    "grow": [{"at_tokens": 32 * 2048 * 400, "to": {"num_hidden_layers": 24}}],
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["anychip", *words])
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def small(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def test_each_model_has_its_shape_and_its_tokens() -> None:
    recipe = load_recipe(GROWING)
    first, second, third = model_stages(recipe)
    batch = recipe.training.global_batch_size * recipe.training.seq_length
    assert [stage.workload.hidden for stage in (first, second, third)] == [8192, 10_240, 20_480]
    assert [stage.workload.layers for stage in (first, second, third)] == [64, 80, 140]
    assert first.start == 0 and second.start == first.tokens and third.start == first.tokens + second.tokens
    assert 0 <= first.tokens - recipe.grow[0].at_tokens < batch  # growth waits for the end of a step
    assert third.start + third.tokens == recipe.training.steps * batch
    assert "52.8 B parameters" in first.title and "1,083.8 B parameters" in third.title
    assert [stage.number for stage in model_stages(recipe, number=2)] == [2]
    assert model_stages(recipe, total_tokens=3e12)[-1].tokens == 3e12 - third.start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"number": 3}, "has 3 models"), ({"number": -1}, "is -1"), ({"total_tokens": 1e12}, "before the last growth")],
)
def test_what_a_recipe_does_not_have_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_stages(load_recipe(GROWING), **arguments)


def test_the_verb_plans_every_model_and_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", str(GROWING), "--cluster", CLUSTER, "--json")
    found = json.loads(out)
    assert code == 0 and [model["growths"] for model in found["models"]] == [0, 1, 2]
    days = [model["goodput"]["days"] for model in found["models"]]
    assert found["all"]["days"] == pytest.approx(sum(days)) and all(day > 0 for day in days)
    assert found["all"]["days_interval"][0] < found["all"]["days"] < found["all"]["days_interval"][1]
    rates = [model["chosen"]["tokens_per_second_per_device"] for model in found["models"]]
    assert rates[0] > rates[1] > rates[2]
    code, out, _ = run(capsys, "plan", str(GROWING), "--cluster", CLUSTER, "--model-stage", "2", "--json")
    assert code == 0 and json.loads(out)["chosen"] == found["models"][2]["chosen"]


def test_what_does_not_fit_is_said_and_the_others_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "plan",
        str(GROWING),
        "--chip",
        "ascend-910b3",
        "--devices",
        "64",
        "--set",
        "training.global_batch_size=1344",
    )
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "model 0 (of 0 to 2): 52.8 B" in out and "model 2 (of 0 to 2): 1,083.8 B" in out
    assert "in none of" in out and "all models: not all of them fit" in out


def test_where_no_model_fits_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"hidden_size": 65_536, "intermediate_size": 262_144, "num_attention_heads": 512}
    path = small(tmp_path, model={**SMALL["model"], **wide})
    code, out, _ = run(capsys, "plan", str(path), "--chip", "ascend-910b3", "--devices", "8")
    assert code == 3 and "all models: not all of them fit" in out
    assert re.search(r"model 0 \(of 0 to 1\): [\d,.]+ B parameters, 26\.\d M tokens from 0 on", out)


def test_figures_keep_digits() -> None:
    assert [amount(count) for count in (0, 5e6, 52.8e9, 1.0838e12)] == ["0", "5.0 M", "52.8 B", "1,083.8 B"]


def test_what_fits_nowhere_is_unfit(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", str(ROOT / "recipes/telechat2-115b.yaml"), "--chip", "ascend-910b3",
                       "--devices", "8")  # fmt: skip
    assert code == 3 and "is nearest, stage" in err


def test_an_explanation_is_of_every_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "explain", str(small(tmp_path)), "tp2", "--chip", "a100-80g", "--devices", "8")
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.count("layout dp4 tp2") == 2 and "model 1 (of 0 to 1)" in out
    code, out, _ = run(capsys, *words, "--model-stage", "1")
    assert code == 0 and out.startswith("layout dp4 tp2") and out.count("activations") == 1


def test_a_page_shows_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    words = ("plan", str(small(tmp_path)), "--chip", "a100-80g", "--devices", "8", "--html", str(page))
    code, _, err = run(capsys, *words)
    assert code == 2 and "--model-stage" in err and not page.exists()
    code, _, _ = run(capsys, *words, "--model-stage", "0", "--fixed")
    assert code == 0 and page.exists()


def test_a_kept_plan_foresees_every_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, runs = small(tmp_path), tmp_path / "runs"
    words = ("plan", str(path), "--chip", "a100-80g", "--devices", "8", "--runs", str(runs))
    code, _, err = run(capsys, *words, "--save")
    assert code == 2 and "Give --fixed" in err
    assert run(capsys, *words, "--save", "--fixed")[0] == 0
    recipe, kept = load_recipe(path), runs / "small" / "plan.json"
    first, second = (predicted_rate(stage.recipe, kept, 8) for stage in model_stages(recipe))
    assert first is not None and second is not None and 1.5 < first / second < 2.5
    assert predicted_rate(recipe, kept, 8) == first  # the model that the recipe starts with
    assert predicted_rate(recipe, kept, 16) is None and predicted_rate(recipe, tmp_path / "none.json", 8) is None
