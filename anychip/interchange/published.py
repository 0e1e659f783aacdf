"""A published model directory: config.json, weights in one or many files, tensors checked against the configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.errors import InputError
from anychip.families.layouts import IGNORED_SUFFIXES, Layout, config_from_json, published_tensors
from anychip.families.published import PublishedTensor
from anychip.interchange.safetensors_file import SafetensorsFile
from anychip.interchange.source import WeightFile, open_regular, read_tensor
from anychip.interchange.torch_bin import TorchBinFile
from anychip.recipe.schema import ModelConfig

_MAX_JSON_BYTES = 64 << 20
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PublishedDirectory:
    """Opens a directory and checks that its files hold exactly the tensors that its config.json describes.

    Raises InputError naming the file and the tensor otherwise. `warnings` holds what is odd but usable. Symbolic links
    are followed, because the snapshots of a Hugging Face cache consist of them; what an index names must still be a
    plain name beside it, and only regular files are opened.
    """

    def __init__(self, path: Path, known: tuple[ModelConfig, Layout] | None = None) -> None:
        """known: the model that was just written there, and how."""
        self.path = path
        self.layout: Layout = "family"
        self.warnings: list[str] = []
        if known is not None:
            self.config, self.layout = known
        else:
            raw = read_json_object(path / "config.json")
            self.config, self.warnings = config_from_json(raw, str(path / "config.json"))
        self._files: dict[str, WeightFile] = {}
        for file in _weight_files(path):
            for name in file.entries:
                if name.endswith(IGNORED_SUFFIXES):
                    continue
                if name in self._files:
                    raise InputError(f"holds {name}, which {self._files[name].path.name} holds too.", where=file.path)
                self._files[name] = file
        self._check_tensors()

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        return read_tensor(self._files[name], name)

    def tensors(self) -> Iterator[PublishedTensor]:
        return published_tensors(self.config, self.layout)

    def _check_tensors(self) -> None:
        expected = {t.name: t.shape for t in self.tensors() if not t.repeats or t.name in self._files}
        missing = [name for name in expected if name not in self._files]
        extra = [name for name in self._files if name not in expected]
        if missing or extra:
            parts = [f"lacks {_some(missing)}"] if missing else []
            parts += [f"has {_some(extra)}, which its config.json does not describe"] if extra else []
            raise InputError(
                f"{' and '.join(parts)}.", where=self.path, do="Complete the download or correct config.json."
            )
        for name, shape in expected.items():
            entry = self._files[name].entries[name]
            if entry.shape != shape:
                raise InputError(
                    f"holds {name} with shape {list(entry.shape)}; config.json asks for {list(shape)}.",
                    where=self._files[name].path,
                    do="The weights and config.json belong to different models.",
                )
            if entry.dtype not in _WEIGHT_DTYPES:
                raise InputError(
                    f"holds {name} as {entry.dtype}; weights are read in bfloat16, float16 and float32.",
                    where=self._files[name].path,
                )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size, or InputError."""
    try:
        with os.fdopen(open_regular(path), "rb") as handle:
            text = handle.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}).", where=path, do="Check the disk.") from None
    if len(text) > _MAX_JSON_BYTES:
        raise InputError(f"is larger than {_MAX_JSON_BYTES >> 20} MiB.", where=path, do="Download the file again.")
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError("is not valid JSON.", where=path, do="Download the file again.") from None
    if not isinstance(value, dict):
        raise InputError("is not a JSON object.", where=path, do="Download the file again.")
    return value


def _weight_files(path: Path) -> list[WeightFile]:
    """The weight files in use: safetensors before .bin, an index before a single file."""
    kinds: tuple[tuple[str, str, Callable[[Path], WeightFile]], ...] = (
        ("model.safetensors", "model.safetensors.index.json", SafetensorsFile),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", TorchBinFile),
    )
    for single, index, opener in kinds:
        if (path / index).is_file():
            return [opener(path / name) for name in _indexed_files(path / index)]
        if (path / single).is_file():
            return [opener(path / single)]
    raise InputError(
        "holds no model.safetensors and no pytorch_model.bin, nor an index of several.",
        where=path,
        do="Complete the download.",
    )


def _indexed_files(index: Path) -> list[str]:
    """File names in an index; they must lie beside it."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map.", where=index, do="Download the file again.")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
            raise InputError(
                f"names the file {ascii(name)[:80]}, which is not beside it.",
                where=index,
                do="Do not trust this model.",
            )
    return sorted(set(weight_map.values()))


def _some(names: list[str]) -> str:
    shown = ", ".join(name if name.isascii() and name.isprintable() else ascii(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
