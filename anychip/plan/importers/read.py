"""Telling foreign files apart and reading them."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

import yaml

from anychip.errors import InputError
from anychip.plan.importers.found import Found, Imported, imported
from anychip.plan.importers.hugging_face import from_config
from anychip.plan.importers.megatron import from_script
from anychip.plan.importers.mindformers import from_yaml
from anychip.plan.importers.torchtitan import from_toml

Kind = Literal["megatron", "mindformers", "torchtitan", "huggingface"]
KINDS: tuple[Kind, ...] = ("megatron", "mindformers", "torchtitan", "huggingface")
_BY_SUFFIX: dict[str, Kind] = {
    ".json": "huggingface",
    ".yaml": "mindformers",
    ".yml": "mindformers",
    ".toml": "torchtitan",
}
_LARGEST: dict[Kind, int] = {
    "megatron": 1_000_000,
    "huggingface": 1_000_000,
    "torchtitan": 200_000,
    "mindformers": 200_000,
}
_MOST_DOTS = 100  # in a line of TOML, whose parser takes the square of a name's parts in time
_MOST_MERGED = 10_000  # fields that `<<` of YAML puts together


def import_recipe(path: Path, kind: Kind | None = None, devices: int | None = None) -> Imported:
    """The recipe that a foreign file describes. What it does not say is assumed and noted.

    `devices`: processes of the run, for sources whose data-parallel degree is what the others leave.

    Raises InputError when the file cannot be read or describes a model that recipes cannot.
    """
    kind = kind or _BY_SUFFIX.get(path.suffix.lower(), "megatron")
    try:
        if path.stat().st_size > _LARGEST[kind]:
            raise InputError("is too large for a configuration.", where=path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}.", where=path, do="Give a text file in UTF-8.") from None
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.parent.name if path.name == "config.json" else path.stem) or "imported"
    try:
        return imported(_found(text, kind, name, devices), str(path))
    except InputError as error:
        raise error if error.where else InputError(error.what, where=path, do=error.do) from None


def _found(text: str, kind: Kind, name: str, devices: int | None) -> Found:
    if kind == "megatron":
        return from_script(text, name, devices)
    raw = {"huggingface": _json, "mindformers": _yaml, "torchtitan": _toml}[kind](text)
    if not isinstance(raw, dict):
        raise InputError("does not hold named settings.", do=f"Give a file of {kind}, or another --format.")
    if kind == "torchtitan":
        return from_toml(raw, name, devices)
    return from_config(raw, name) if kind == "huggingface" else from_yaml(raw, name)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is no JSON: {error}.") from None


class _Loader(yaml.SafeLoader):
    """Plain values only, and no fields that multiply: `<<` of references to references doubles them at each step."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for part in parts:
                    if isinstance(part, yaml.MappingNode):
                        self.flatten_mapping(part)
                if sum(len(part.value) for part in parts) > _MOST_MERGED:
                    raise yaml.YAMLError("more fields are merged than a configuration has")
        super().flatten_mapping(node)


def _yaml(text: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"is no YAML: {str(error).splitlines()[0][:200] if str(error) else 'unreadable'}.") from None


def _toml(text: str) -> Any:
    tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise InputError("is no TOML of torchtitan: a line has more dots than names have parts.")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is no TOML: {error}.") from None
