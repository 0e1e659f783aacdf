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
_LARGEST = 5_000_000


def import_recipe(path: Path, kind: Kind | None = None) -> Imported:
    """The recipe that a foreign file describes. What it does not say is assumed and noted.

    Raises InputError when the file cannot be read or describes a model that recipes cannot.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError("is too large for a configuration.", where=path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}.", where=path, do="Give a text file in UTF-8.") from None
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.parent.name if path.name == "config.json" else path.stem) or "imported"
    try:
        return imported(_found(text, kind or _BY_SUFFIX.get(path.suffix.lower(), "megatron"), name), str(path))
    except InputError as error:
        raise error if error.where else InputError(error.what, where=path, do=error.do) from None


def _found(text: str, kind: Kind, name: str) -> Found:
    if kind == "megatron":
        return from_script(text, name)
    reader = {"huggingface": (_json, from_config), "mindformers": (_yaml, from_yaml), "torchtitan": (_toml, from_toml)}
    parse, read = reader[kind]
    raw = parse(text)
    if not isinstance(raw, dict):
        raise InputError("does not hold named settings.", do=f"Give a file of {kind}, or another --format.")
    return read(raw, name)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is no JSON: {error}.") from None


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"is no YAML: {str(error).splitlines()[0] if str(error) else 'unreadable'}.") from None


def _toml(text: str) -> Any:
    tomllib: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"is no TOML: {error}.") from None
