"""The stand-in for `torch_npu` against the schemas in the real wheel, which are read without loading it: it cannot be
imported where there is no driver."""

from __future__ import annotations

import inspect
from importlib import metadata
from pathlib import Path

import pytest
import torch
from fake_npu import fake_npu

FUNCTIONS = sorted(name for name in vars(fake_npu()) if name.startswith("npu_"))


@pytest.fixture(scope="module")
def library() -> bytes:
    try:
        files = metadata.files("torch-npu") or []
    except metadata.PackageNotFoundError:
        pytest.skip("torch-npu is not installed: pip install --no-deps torch-npu==2.13.0")
    path = next((file.locate() for file in files if file.name == "libtorch_npu.so"), None)
    assert path is not None
    return Path(str(path)).read_bytes()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stand_in_takes_the_arguments_of_the_wheel(library: bytes, name: str) -> None:
    start = library.find(f"\0{name}(Tensor".encode()) + 1
    assert start, f"the wheel has no {name}"
    schema = torch._C.parse_schema(library[start : library.index(b"\0", start)].decode())
    real = {argument.name: argument for argument in schema.arguments}
    ours = inspect.signature(getattr(fake_npu(), name)).parameters.values()
    assert {p.name for p in ours} <= set(real)
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    taken = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert taken == positional[: len(taken)]
    required = {n for n, argument in real.items() if not argument.has_default_value()}
    assert required <= {p.name for p in ours}
