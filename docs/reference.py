"""Writes docs/{en,zh}/recipe-fields.md from the recipe's schema, so that the two never disagree.

python docs/reference.py
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from anychip.recipe import Recipe

TITLES = {
    "en": (
        "# Recipe fields",
        "Made from the schema by `python docs/reference.py`.",
        "| field | values | default | meaning |",
    ),
    "zh": (
        "# 配方字段",
        "由 `python docs/reference.py` 从模式生成；说明保留英文原文。",
        "| 字段 | 取值 | 默认 | 说明 |",
    ),
}


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def values(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(values(inner) for inner in get_args(annotation))
    if annotation is type(None):
        return "null"
    if get_origin(annotation) in (list, tuple, dict):
        return get_origin(annotation).__name__ + " of " + values(get_args(annotation)[-1])
    if hasattr(annotation, "__metadata__"):
        return values(get_args(annotation)[0])
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}.get(
        annotation.__name__, annotation.__name__
    )


def rows(model: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = next(sections_in(field.annotation), None)
        here = f"{path}{name}"
        if inner is not None:
            many = get_origin(field.annotation) is list
            yield from rows(inner, f"{here}{'[]' if many else ''}.")
            continue
        factory = field.default_factory
        default = factory() if callable(factory) else field.default  # type: ignore[call-arg]
        shown = "required" if default is PydanticUndefined else f"`{default}`".replace("None", "null")
        meaning = (field.description or "").replace("|", "\\|")
        yield f"| `{here}` | {values(field.annotation)} | {shown} | {meaning} |"


def page(language: str) -> str:
    title, note, head = TITLES[language]
    return "\n".join([title, "", note, "", head, "|---|---|---|---|", *rows(Recipe)]) + "\n"


def main() -> None:
    for language in TITLES:
        path = Path(__file__).parent / language / "recipe-fields.md"
        path.write_text(page(language), encoding="utf-8")


if __name__ == "__main__":
    main()
