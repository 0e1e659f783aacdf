"""The device is compiled once, whole or not at all, and a missing compiler is said plainly."""

from __future__ import annotations

from pathlib import Path

import pytest
from device_process import needs_device

from anychip.chips.emulated.build import library
from anychip.errors import AnychipError, InputError


def test_without_a_compiler_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="C\\+\\+ compiler"):
        library()


def test_a_failing_compiler_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(AnychipError, match="no such header"):
        library()
    assert [path.suffix for path in (tmp_path / "cache/anychip/emulated").iterdir()] == [".lock"]


@needs_device
def test_what_is_compiled_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    built = library()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert library() == built
    assert built.exists()
