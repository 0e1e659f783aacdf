"""export, import and init as a user meets them: bad input is one paragraph and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import make_run, tiny_recipe
from tiny_run import start

from anychip.cli import main
from anychip.interchange.export import export_run
from anychip.recipe import dump_recipe


def anychip(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def one_paragraph(message: str, words: list[str]) -> None:
    assert message.startswith("anychip: ") and message.count("\n") == 1, message
    assert all(word in message for word in words), message


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny with a checkpoint, model/ exported from it, and recipe.yaml that can import it."""
    folder = tmp_path_factory.mktemp("place")
    export_run(make_run(folder / "runs" / "tiny"), out=folder / "model")
    recipe = yaml.safe_load(dump_recipe(tiny_recipe("again")))
    recipe["data"]["tokenizer"] |= {"kind": "json", "path": str(folder / "model" / "tokenizer.json")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "junk").mkdir()
    (folder / "junk" / "config.json").write_text("{nonsense")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nothing"], ["nothing", "recipe.yaml"]),
        (["export", "model"], ["model", "recipe.yaml"]),
        (["export", "runs/tiny", "--step", "77"], ["step 77", "5"]),
        (["export", "runs/tiny", "--stage", "rlhf"], ["rlhf", "pretrain"]),
        (["export", "runs/tiny", "--stage", "sft"], ["no finished checkpoint"]),
        (["export", "runs/tiny", "--out", "."], ["left as it is", "--out"]),
        (["export", "runs/tiny", "--out", "recipe.yaml/x"], ["recipe.yaml/x", "could not be written"]),
        (["import", "nothing", "recipe.yaml"], ["nothing", "config.json"]),
        (["import", "junk", "recipe.yaml"], ["junk/config.json", "JSON"]),
        (["import", "runs/tiny", "recipe.yaml"], ["runs/tiny", "config.json"]),
        (["import", "model", "nothing.yaml"], ["nothing.yaml"]),
        (["import", "model", "recipe.yaml", "--set", "model.hidden_size=64", "--set", "name=a"], ["hidden_size 32"]),
        (["import", "model", "recipe.yaml", "--set", "data.tokenizer={kind: bpe}", "--set", "name=b"], ["tokenizer"]),
        (["init", "recipe.yaml", "--set", "model.preset=telechat9"], ["telechat9", "telechat2-7b"]),
        (["init", "recipe.yaml", "--set", "model.hidden_size=33"], ["hidden_size 33"]),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["anychip", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    one_paragraph(capsys.readouterr().err, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nothing"], ["nothing", "recipe.yaml"]),
        (["import", "junk", "recipe.yaml"], ["junk/config.json", "JSON"]),
        (["init", "recipe.yaml", "--set", "model.hidden_size=33"], ["hidden_size 33"]),
    ],
)
def test_the_same_from_a_shell(arguments: list[str], words: list[str], place: Path) -> None:
    code, _, err = anychip(place, *arguments)
    assert code == 2
    one_paragraph(err, words)


def test_import_then_export_works_and_says_where(place: Path) -> None:
    code, out, err = anychip(place, "import", "model", "recipe.yaml", "--set", "name=copy")
    assert code == 0 and "runs/copy/checkpoints/step-000000" in out, err
    code, out, err = anychip(place, "export", "runs/copy")
    assert code == 0 and "runs/copy/export" in out, err
    record = json.loads((place / "runs/copy/export/conversion.json").read_text())
    weights = "model.safetensors"
    assert (place / "runs/copy/export" / weights).read_bytes() == (place / "model" / weights).read_bytes()
    assert record["logit_check"]["passed"]
