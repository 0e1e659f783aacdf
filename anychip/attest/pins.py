"""What is pinned before the first step: code, recipe, environment, data and policy, as one JSON object."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import anychip
from anychip.attest.check.findings import canonical, sha256
from anychip.data.corpora import read_summary
from anychip.files import sha256_file
from anychip.recipe import Recipe
from anychip.recipe.schema import AttestConfig, DialogSource
from anychip.rundir import RunDirectory

PACKAGE = Path(anychip.__file__).parent


def pin_inputs(recipe: Recipe, run: RunDirectory, stage: str) -> dict[str, Any]:
    """Everything that decides what a stage computes, beside the chips."""
    return {
        "anychip": anychip.__version__,
        "code": {"package": package_digest(), **_commit()},
        "recipe": recipe.model_dump(mode="json"),
        "environment": environment(),
        "data": data_digests(recipe, run, stage),
        "policy": policy(recipe.attest),
    }


def policy(config: AttestConfig) -> dict[str, list[str]]:
    return {
        name: [word.lower() for word in getattr(config, name)]
        for name in ("allow_vendors", "deny_vendors", "deny_country")
    }


@cache
def package_digest() -> str:
    """SHA-256 over names and digests of all files of this package but byte code."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            found.update(f"{path.relative_to(PACKAGE).as_posix()} {sha256_file(path)}\n".encode())
    return found.hexdigest()


@cache
def environment() -> dict[str, Any]:
    """Python, system, and every installed distribution with the digest of its RECORD, which lists the digests of its
    files as they were installed. The files themselves are not read."""
    rows = {(name.lower(), found.version, _record_digest(found))
            for found in distributions() if (name := found.metadata["Name"])}  # fmt: skip
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "distributions": [
            {"name": name, "version": version, "record": record}
            for name, version, record in sorted(rows, key=lambda row: (row[0], row[1], row[2] or ""))
        ],
    }


def environment_digest() -> str:
    """What tells apart the environments of two ranks."""
    return sha256(canonical(environment()["distributions"]))


def data_digests(recipe: Recipe, run: RunDirectory, stage: str) -> dict[str, str]:
    """SHA-256 of what a stage learns from, by name. Of a corpus the digest of its packed tokens, or, where it was
    packed elsewhere, of the digests of their blocks."""
    summary = read_summary(run)
    found = {"tokenizer": str(summary["tokenizer"]["digest"])}
    for name, held in summary["sources"].items():
        side = held.get("train", held)
        found[f"corpus {name}"] = str(side.get("bin_sha256") or held.get("blocks_sha256") or sha256(canonical(held)))
    config = getattr(recipe.tune, stage, None)
    for source in getattr(config, "sources", ()):
        found[f"dialogs {source.path}"] = _dialogs_digest(source)
    return found


def _dialogs_digest(source: DialogSource) -> str:
    """`python:docstrings` are those of this Python: its version stands for them."""
    path = Path(source.path).expanduser()
    return sha256_file(path) if path.is_file() else sha256(f"{source.path} {platform.python_version()}".encode())


def _record_digest(distribution: Distribution) -> str | None:
    text = distribution.read_text("RECORD")
    return None if text is None else sha256(text.encode())


@cache
def _commit() -> dict[str, Any]:
    """The commit that this package is at, and whether its files differ from it; unknown outside a working copy."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", "__init__.py") is not None
    commit, changed = (git("rev-parse", "HEAD"), git("status", "--porcelain", ".")) if tracked else (None, None)
    return {"commit": commit, "changed": None if changed is None else bool(changed)}
