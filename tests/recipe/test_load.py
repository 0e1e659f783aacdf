"""A recipe is read, overridden, migrated and refused with words that help."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import InputError
from anychip.recipe import dump_recipe, load_recipe, parse_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

MINIMAL = {
    "schema_version": 1,
    "name": "t",
    "model": {"preset": "telechat2-7b"},
    "data": {"sources": [{"name": "a", "path": "python:stdlib"}]},
    "training": {"steps": 3},
}


def write(tmp_path: Path, recipe: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def with_section(section: str, values: dict[str, object]) -> dict[str, object]:
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), **values}}  # type: ignore[dict-item]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(resolved) == recipe


def test_preset_fields_can_be_overridden(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["model.num_hidden_layers=2", "optimizer.lr=3e-4"])
    assert (recipe.model.hidden_size, recipe.model.num_hidden_layers, recipe.optimizer.lr) == (4096, 2, 3e-4)


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["data.sources.0.weight=2.5"])
    assert recipe.data.sources[0].weight == 2.5


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (with_section("training", {"compute_dtype": "fp8"}), ["training.compute_dtype", "'auto', 'bf16' or 'fp32'"]),
        (with_section("training", {"step": 3}), ["training.step", "did you mean steps?"]),
        (with_section("optimizer", {"lr": -1}), ["optimizer.lr", "greater than 0"]),
        (with_section("model", {"preset": "telechat9"}), ["model.preset", "telechat2-115b"]),
        (with_section("model", {"num_attention_heads": 7}), ["not a multiple"]),
        (with_section("training", {"micro_batch_size": 3}), ["global_batch_size"]),
        ({**MINIMAL, "schema_version": 99}, ["schema_version is 99"]),
        ({**MINIMAL, "name": "../evil"}, ["name"]),
        ([1, 2], ["holds no sections"]),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(recipe: object, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        load_recipe(write(tmp_path, recipe))
    for word in words:
        assert word in raised.value.paragraph


@pytest.mark.parametrize(
    "override", ["training.steps", "=3", "a..b=1", "data.sources.9.weight=1", "name.x=1", "seed=[1", "name=2020-99-99"]
)
def test_a_wrong_override_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_recipe(write(tmp_path, MINIMAL), [override])


def test_version_0_is_migrated(tmp_path: Path) -> None:
    old = {key: value for key, value in MINIMAL.items() if key not in ("schema_version", "training")}
    recipe = load_recipe(write(tmp_path, {**old, "train": {"steps": 5}, "optimizer": {"learning_rate": 0.5}}))
    assert (recipe.schema_version, recipe.training.steps, recipe.optimizer.lr) == (1, 5, 0.5)


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff\xfe", b"a: [", b"- 1", b"a: &x [*x]", b"{" * 5000, b"a: 2020-99-99", b"a: \x00"]
)
def test_junk_is_one_paragraph(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "junk.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_recipe(path)


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(section=st.sampled_from(["model", "data", "training", "optimizer", "tune", "eval"]), value=yaml_values)
def test_any_value_in_any_section_is_accepted_or_refused_with_a_paragraph(section: str, value: object) -> None:
    try:
        parse_recipe({**MINIMAL, section: value}, "recipe")
    except InputError as error:
        assert error.paragraph
