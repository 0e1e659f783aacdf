"""The life of a step directory: written beside, renamed, marked complete last, and retired whole.

    ROOT/step-000120/{rank-0000.safetensors, ..., manifest.json, COMPLETE}

COMPLETE holds the digest of manifest.json, which holds the digests of everything else. A directory without COMPLETE is
not a checkpoint. Whatever instant a process dies at, the directories with COMPLETE are whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anychip import alive
from anychip.errors import AnychipError, InputError, UnfitError
from anychip.files import atomic_writer, fsync_directory, lock_alone
from anychip.train.checkpoint.manifest import LARGEST_MANIFEST_BYTES, MANIFEST_NAME, Manifest, parse_manifest
from anychip.train.fence import fence

MARKER_NAME = "COMPLETE"
_MARKER_BYTES = 256
_STEP_NAME = re.compile(r"step-(\d{6,15})")
_SAVING, _RETIRED = ".saving-", ".retired-"


class CheckpointError(AnychipError):
    """A checkpoint could not be written; the ones before it are untouched."""


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def complete_steps(root: Path) -> list[int]:
    """Steps whose directory carries its marker, ascending."""
    return _steps(root, complete=True)


def unfinished_steps(root: Path) -> list[int]:
    """Steps whose directory has no marker, ascending: a process died while it published them, or the marker is lost."""
    return _steps(root, complete=False)


def _steps(root: Path, *, complete: bool) -> list[int]:
    if not root.is_dir():
        return []
    entries = (entry for entry in root.iterdir() if (entry / MARKER_NAME).exists() == complete)
    matches = (_STEP_NAME.fullmatch(entry.name) for entry in entries)
    return sorted(step for match in matches if match and step_name(step := int(match[1])) == match[0])


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest. Raises UnfitError when it is damaged, InputError when it makes no sense."""
    path = directory / MANIFEST_NAME
    try:
        marker = _read_small(directory / MARKER_NAME, _MARKER_BYTES)
        text = _read_small(path, LARGEST_MANIFEST_BYTES)
    except OSError as error:
        raise UnfitError(
            f"cannot be read ({error.strerror}).", where=error.filename or path, do="Use another checkpoint."
        ) from error
    if marker != _marker(text):
        what = f"does not have the digest that {MARKER_NAME} holds: one of the two was changed or is damaged."
        raise UnfitError(what, where=path, do="Use another checkpoint.")
    manifest = parse_manifest(text, path)
    if step_name(manifest.step) != directory.name:
        raise InputError(
            f"is of step {manifest.step}, not of {directory.name}.", where=path, do="Rename the directory."
        )
    return manifest


@contextmanager
def saving_directory(root: Path, step: int) -> Iterator[Path]:
    """A new directory to write the checkpoint of `step` into and then `publish`; unpublished, it is removed.

    What dead saves left is removed first. Raises CheckpointError while another process saves below the same root.
    """
    root.mkdir(parents=True, exist_ok=True)
    with only_writer(root):
        for entry in root.iterdir():
            if _is_leftover(entry):
                _remove(entry)
        directory = root / f"{_SAVING}{step_name(step)}-{secrets.token_hex(4)}"
        directory.mkdir()
        try:
            yield directory
        finally:
            for entry in (directory, root / step_name(step)):
                with suppress(OSError):  # what stays is removed by the next save
                    if _is_leftover(entry):
                        retire(entry)


@contextmanager
def only_writer(root: Path) -> Iterator[None]:
    """Hold the lock of the root; the system releases it when the process dies."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not lock_alone(descriptor):
            do = "Run one training per run directory."
            raise CheckpointError("another process is saving a checkpoint here", where=root, do=do)
        yield
    finally:
        with suppress(OSError):  # closed all the same
            os.close(descriptor)


def _is_leftover(entry: Path) -> bool:
    if entry.name.startswith((_SAVING, _RETIRED)):
        return entry.exists()
    return bool(_STEP_NAME.fullmatch(entry.name)) and entry.is_dir() and not (entry / MARKER_NAME).exists()


def publish(directory: Path, manifest: Manifest) -> Path:
    """Turn the directory that `saving_directory` gave into the checkpoint of its step."""
    text = manifest.to_json()
    _write(directory / MANIFEST_NAME, text)
    if parse_manifest(_read_small(directory / MANIFEST_NAME, LARGEST_MANIFEST_BYTES), directory) != manifest:
        raise UnfitError("reads back differently from what was written.", where=directory / MANIFEST_NAME)
    fsync_directory(directory)
    final = directory.parent / step_name(manifest.step)
    fence().check()
    if final.exists():  # only a damaged one: the store refuses to save over a good one
        retire(final)
    directory.rename(final)
    fsync_directory(final.parent)
    fence().check()
    _write(final / MARKER_NAME, _marker(text))
    return final


def retire(directory: Path) -> None:
    """Remove a checkpoint: it disappears as a whole first, so that a kill never leaves half of it."""
    if not directory.name.startswith("."):
        hidden = directory.with_name(f"{_RETIRED}{directory.name}-{secrets.token_hex(4)}")
        directory.rename(hidden)
        fsync_directory(hidden.parent)
        directory = hidden
    _remove(directory)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        for file in entry.iterdir():
            with suppress(OSError):
                file.unlink()
            alive.progressed()
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _marker(manifest_text: bytes) -> bytes:
    return f"anychip-checkpoint {MANIFEST_NAME} sha256 {hashlib.sha256(manifest_text).hexdigest()}\n".encode()


def _write(path: Path, data: bytes) -> None:
    with atomic_writer(path) as handle:
        handle.write(data)


def _read_small(path: Path, limit: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as handle:
        text = handle.read(limit + 1)
    if len(text) > limit:
        raise UnfitError(f"is larger than {limit} bytes.", where=path, do="Use another checkpoint.")
    return text
