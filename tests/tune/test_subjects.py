"""Tuning can be narrowed to some subjects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anychip.errors import InputError
from anychip.recipe.schema import SftConfig
from anychip.tune.sources import load_dialogs


def test_only_the_named_modules_classes_and_functions_stay() -> None:
    dialogs = load_dialogs(SftConfig(subjects=["str", "os.path"]))
    subjects = {dialog.subject for dialog in dialogs}
    assert {"str.upper", "os.path.join"} <= subjects
    assert all(subject.startswith(("str.", "os.path.")) or subject in ("str", "os.path") for subject in subjects)


def test_a_subject_that_nothing_is_about_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dialogs.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    with pytest.raises(InputError, match="no dialog about strings"):
        load_dialogs(SftConfig(dataset=str(path), subjects=["strings"]))
