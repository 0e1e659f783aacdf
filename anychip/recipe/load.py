"""From a YAML file and `--set` overrides to a checked Recipe, or to a message that names the field."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from anychip.errors import InputError
from anychip.families.presets import PRESETS
from anychip.recipe.migrate import migrate
from anychip.recipe.schema import Recipe

_MAX_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class FileKind:
    """What a YAML file should have been, for those who gave another."""

    name: str
    example: str
    sections: str


RECIPE = FileKind("recipe", "recipes/demo.yaml", "model, data and training")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides in order, expand the preset, and check everything.

    Raises InputError naming the file, the field, what was found and what is allowed.
    """
    raw = migrate(read_yaml(path), str(path))
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Check a recipe that is already a dictionary of today's schema version."""
    try:
        return Recipe.model_validate(_expand_preset(raw, where))
    except ValidationError as error:
        raise InputError(" ".join(explain(error, Recipe)), where=where) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every field with its value; reading it back gives an equal Recipe."""
    header = "# The resolved recipe of this run: every field, defaults included.\n"
    return header + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path, kind: FileKind = RECIPE) -> dict[str, Any]:
    """The mapping in a small YAML file; InputError says what is wrong with it otherwise."""
    try:
        if path.stat().st_size > _MAX_RECIPE_BYTES:
            raise InputError(
                f"is larger than 1 MiB and so no {kind.name}.",
                where=path,
                do=f"Give the path of a {kind.name} in YAML.",
            )
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror}).",
            where=path,
            do=f"Give the path of a {kind.name}, such as {kind.example}.",
        ) from None
    except UnicodeDecodeError:
        raise InputError("is not text in UTF-8.", where=path, do=f"Give the path of a {kind.name} in YAML.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 99th of a month
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        said = "the text nests too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        problem = getattr(error, "problem", None) or said
        raise InputError(f"is not valid YAML{line}: {problem}.", where=path, do="Correct that line.") from None
    if not isinstance(raw, dict):
        raise InputError("holds no sections.", where=path, do=f"A {kind.name} is a mapping with {kind.sections}.")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise InputError(
            f"--set {override} is not of the form section.field=value.", do="Example: --set training.steps=100"
        )
    try:
        value = _yaml_value(text)
    except (yaml.YAMLError, ValueError):
        raise InputError(
            f"--set {override}: the value is not valid YAML.", do="Quote it if it holds special characters."
        ) from None
    node: Any = raw
    for key in keys[:-1]:
        node = _descend(node, key, override)
    if isinstance(node, list):
        node[_index(node, keys[-1], override)] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value
    else:
        raise InputError(f"--set {override}: {'.'.join(keys[:-1])} has no fields.", do="Check the field's name.")


def _yaml_value(text: str) -> Any:
    """YAML 1.1 reads `3e-4` as text, which is never what a learning rate means."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _descend(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if not isinstance(node, dict):
        raise InputError(f"--set {override}: {key} has no parent section.", do="Check the field's name.")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise InputError(f"--set {override}: {key} is not an index below {len(node)}.", do="Lists count from 0.")
    return int(key)


def _expand_preset(raw: dict[str, Any], where: str) -> dict[str, Any]:
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return raw
    preset = model["preset"]
    if preset not in PRESETS:
        raise InputError(f"model.preset is {preset!r}; allowed: {', '.join(sorted(PRESETS))}.", where=where)
    return {**raw, "model": {**PRESETS[preset], **model}}


def explain(error: ValidationError, schema: type[BaseModel]) -> Iterable[str]:
    """One sentence for each field that `schema` refused."""
    for item in error.errors(include_url=False):
        location = [str(part) for part in item["loc"]]
        field = ".".join(location) or schema.__name__.lower()
        found = repr(item.get("input"))
        found = found if len(found) <= 60 else found[:57] + "..."
        kind = item["type"]
        if kind == "extra_forbidden":
            known = _fields_at(schema, location[:-1])
            close = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}."
            yield f"{field} is not a field of a {schema.__name__.lower()}; {hint}"
        elif kind == "missing":
            yield f"{field} is missing."
        elif kind == "literal_error":
            yield f"{field} is {found}; allowed: {item['ctx']['expected']}."
        elif kind == "value_error":
            yield f"{field}: {item['ctx']['error']}."
        else:
            yield f"{field} is {found}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the fields of the section at `location` (list indices are stepped over)."""
    for name in location:
        if name.isdigit() or name not in model.model_fields:
            continue
        inner = _section_in(model.model_fields[name].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list):
        return next(filter(None, map(_section_in, get_args(annotation))), None)
    return None
