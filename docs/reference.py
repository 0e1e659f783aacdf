"""Writes docs/{en,zh}/recipe-fields.md from the recipe's schema, so that the two never disagree.

python docs/reference.py
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from meanings import CHINESE, ENGLISH, meaning
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from anychip.recipe import Recipe

HEADS = {
    "en": [
        "# Recipe fields",
        "Made from the schema by `python docs/reference.py`; [recipes](recipes.md) says how recipes are used. `[]` "
        "stands for a list item's number, from 0.",
        "| field | values | default | meaning |",
    ],
    "zh": [
        "# 配方字段",
        "由 `python docs/reference.py` 从模式生成；怎样使用配方见[配方](recipes.md)。"
        "`[]` 代表列表项的编号，从 0 开始。",
        "| 字段 | 取值 | 默认 | 说明 |",
    ],
}
WORDS = {
    "en": {
        "required": "required",
        "top": "The recipe itself",
        "optional": "Left out by default",
        "items": "A list",
        "join": ": ",
        "stop": ".",
        "str": "text",
        "int": "whole number",
        "float": "number",
        "bool": "true, false",
        "list": "list of ",
        "dict": "by name: ",
        "JsonValue": "any value",
        "or": " or ",
    },
    "zh": {
        "required": "必填",
        "top": "配方本身",
        "optional": "默认没有这一部分",
        "items": "一个列表",
        "join": "：",
        "stop": "。",
        "str": "文本",
        "int": "整数",
        "float": "数",
        "bool": "true, false",
        "list": "列表：",
        "dict": "按名字：",
        "JsonValue": "任意值",
        "or": "或",
    },
}
# The optimizer's fields are described once; tuning starts from other values for two of them.
SAME_FIELDS = {
    "en": "The fields of [optimizer](#optimizer) and its schedule. Left out: {given}. As soon as one field is given, "
    "the others take the defaults of `optimizer`.",
    "zh": "与 [optimizer](#optimizer) 及其 schedule 的字段相同。没有这一部分时：{given}。"
    "只要给出一个字段，其余字段就取 `optimizer` 的默认值。",
}


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def values(annotation: Any, language: str) -> str:
    """What may stand in a field, in words."""
    words = WORDS[language]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return words["or"].join(values(inner, language) for inner in get_args(annotation))
    if annotation is type(None):
        return "null"
    if get_origin(annotation) in (list, tuple, dict):
        many = "dict" if get_origin(annotation) is dict else "list"
        return words[many] + values(get_args(annotation)[-1], language)
    if hasattr(annotation, "__metadata__"):
        return f"{values(get_args(annotation)[0], language)}{limits(annotation.__metadata__)}"
    return words[annotation.__name__]


def limits(metadata: Any) -> str:
    """Bounds of a number, such as `≥ 0, ≤ 1`."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [item for outer in metadata for item in (outer.metadata if isinstance(outer, FieldInfo) else [outer])]
    bounds = [
        f"{sign} {_short(getattr(item, name))}" for item in found for name, sign in signs.items() if hasattr(item, name)
    ]
    return " " + ", ".join(bounds) if bounds else ""


def _short(bound: float) -> str:
    return "2^63" if bound == 2**63 else f"{bound:g}"


def tables(model: type[BaseModel], path: str, language: str, note: str = "") -> Iterator[str]:
    """The table of a section, then those of the sections inside it."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        here = f"{path}{name}"
        section = next(sections_in(field.annotation), None)
        if section is None:
            rows.append(row(here, field, language))
        else:
            inner.append((here, field, section))
    yield f"## {path.rstrip('.') or WORDS[language]['top']}"
    if note:
        yield note + WORDS[language]["stop"]
    if rows:
        yield "\n".join([HEADS[language][2], "|---|---|---|---|", *rows])
    for here, field, section in inner:
        if here.startswith("tune.") and here.endswith(".optimizer"):
            yield f"## {here}"
            yield SAME_FIELDS[language].format(given=given(field.default))
            continue
        many = any(get_origin(kind) is list for kind in (field.annotation, *get_args(field.annotation)))
        kind = WORDS[language]["items" if many else "optional"] if many or field.default is None else ""
        about = WORDS[language]["join"].join(filter(None, (kind, said(here, field, language))))
        yield from tables(section, f"{here}{'[]' if many else ''}.", language, about)


def given(default: BaseModel, path: str = "") -> str:
    """The values in which a default instance differs from its class's defaults."""
    found = []
    for name in sorted(default.model_fields_set):
        value = getattr(default, name)
        found.append(given(value, f"{path}{name}.") if isinstance(value, BaseModel) else f"`{path}{name}: {value}`")
    return ", ".join(found)


def row(path: str, field: FieldInfo, language: str) -> str:
    factory = field.default_factory
    default = factory() if callable(factory) else field.default  # type: ignore[call-arg]
    shown = WORDS[language]["required"] if default is PydanticUndefined else f"`{as_yaml(default)}`"
    allowed = values(field.annotation, language) + limits(field.metadata)
    return f"| `{path}` | {allowed} | {shown} | {explain(path, field, language)} |"


def as_yaml(value: Any) -> str:
    plain = isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
    return str(value) if plain else json.dumps(value)


def explain(path: str, field: FieldInfo, language: str) -> str:
    text = said(path, field, language)
    if not text:
        raise SystemExit(f"docs/meanings.py does not explain {path} ({language})")
    return text.replace("|", "\\|")


def said(path: str, field: FieldInfo, language: str) -> str:
    return (field.description or meaning(path, ENGLISH)) if language == "en" else meaning(path, CHINESE)


def page(language: str) -> str:
    title, note, _ = HEADS[language]
    return "\n\n".join([title, note, *tables(Recipe, "", language)]) + "\n"


def main() -> None:
    for language in HEADS:
        path = Path(__file__).parent / language / "recipe-fields.md"
        path.write_text(page(language), encoding="utf-8")


if __name__ == "__main__":
    main()
