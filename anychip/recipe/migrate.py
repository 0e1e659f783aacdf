"""Recipes of older schema versions, brought up to today's one version at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anychip.errors import InputError
from anychip.recipe.schema import SCHEMA_VERSION


def _from_0(raw: dict[str, Any]) -> dict[str, Any]:
    """Version 0 (drafts without `schema_version`) called the training section `train`, the rate `learning_rate`."""
    if "train" in raw:
        raw["training"] = raw.pop("train")
    optimizer = raw.get("optimizer")
    if isinstance(optimizer, dict) and "learning_rate" in optimizer:
        optimizer["lr"] = optimizer.pop("learning_rate")
    return raw


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_0}


def migrate(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `raw` in today's schema version. Raises InputError for a version this release does not know."""
    version = raw.get("schema_version", 0)
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version <= SCHEMA_VERSION:
        raise InputError(
            f"schema_version is {version!r}, and this release reads versions 0 to {SCHEMA_VERSION}.",
            where=where,
            do="Use a newer anychip for a newer recipe, or correct the number.",
        )
    for old in range(version, SCHEMA_VERSION):
        raw = _MIGRATIONS[old](raw)
        raw["schema_version"] = old + 1
    return raw
