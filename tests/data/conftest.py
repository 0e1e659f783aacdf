from __future__ import annotations

import pytest
from tiny_corpus import make_recipe, sentence, write_jsonl

from anychip.data.prepare import prepare_data
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Recipe]:
    """A run with two small packed corpora."""
    root = tmp_path_factory.mktemp("prepared")
    one = write_jsonl(root / "one.jsonl", [sentence(n, 20 + n % 30) for n in range(40)])
    two = write_jsonl(root / "two.jsonl", [sentence(1000 + n, 30) for n in range(20)])
    recipe = make_recipe(
        [{"name": "one", "path": str(one), "weight": 3.0}, {"name": "two", "path": str(two), "weight": 1.0}],
        data={"mixture": [{"step": 7, "weights": {"one": 1.0, "two": 2.0}}]},
    )
    run = RunDirectory(root / "run")
    run.write_recipe(recipe)
    prepare_data(recipe, run)
    return run, recipe
