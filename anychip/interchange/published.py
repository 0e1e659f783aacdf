"""A published model directory: config.json, weights in one or many files, tensors checked against the configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from anychip.errors import InputError
from anychip.families.telechat2 import IGNORED_SUFFIXES, PublishedTensor, config_from_json, published_tensors
from anychip.interchange.safetensors_file import SafetensorsFile
from anychip.interchange.source import WeightFile, read_tensor
from anychip.interchange.torch_bin import TorchBinFile

_MAX_JSON_BYTES = 64 << 20


class PublishedDirectory:
    """Opens a directory and checks that its files hold exactly the tensors that its config.json describes.

    Raises InputError naming the file and the tensor otherwise. `warnings` holds what is odd but usable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        return published_tensors(self.config)

    def _check_tensors(self) -> None:
        expected = {tensor.name: tensor.shape for tensor in self.tensors()}
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
            if not entry.dtype.is_floating_point:
                raise InputError(
                    f"holds {name} as {entry.dtype}; only floating point is read.", where=self._files[name].path
                )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size, or InputError."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError("is too large.", where=path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror}).", where=path, do="Give a run directory or a complete model directory."
        ) from None
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
    raise InputError("holds no model.safetensors and no pytorch_model.bin, nor an index of several.", where=path)


def _indexed_files(index: Path) -> list[str]:
    """File names in an index; they must lie beside it."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map.", where=index, do="Download the file again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or name in (".", "..") or "\0" in name or "\\" in name:
            raise InputError(f"names the file {name[:80]!r}, which is not beside it.", where=index)
    return names


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
