"""Where an export goes: it replaces only exports, and a failure leaves everything as it was."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import add_checkpoint, make_run, random_weights, tiny_recipe

from anychip.errors import InputError
from anychip.files import sha256_file
from anychip.interchange import export as export_module
from anychip.interchange.export import export_run
from anychip.rundir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_run(tmp_path / "run")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_file(path) if path.is_file() else "" for path in sorted(folder.rglob("*"))
    }


def test_a_second_export_replaces_the_first(run: RunDirectory) -> None:
    export_run(run)
    add_checkpoint(run, run.read_recipe(), 6, random_weights(run.read_recipe().model, 1))
    assert json.loads((export_run(run) / "conversion.json").read_text())["source"]["step"] == 6
    assert [path.name for path in run.root.iterdir() if path.name.startswith(".")] == []


def test_an_empty_directory_may_become_the_export(run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    assert (export_run(run, out=out) / "config.json").is_file()
    assert (export_run(run, out=tmp_path / "new" / "deep") / "config.json").is_file()


def foreign_folder(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def foreign_record(out: Path) -> None:
    out.mkdir()
    (out / "conversion.json").write_text("{}")


def added_file(out: Path) -> None:
    out.mkdir()
    (out / "conversion.json").write_text(json.dumps({"files": {"config.json": ""}}))
    (out / "config.json").write_text("{}")
    (out / "model-q4.gguf").write_text("made from the export")


def plain_file(out: Path) -> None:
    out.write_text("a file")


def dangling_link(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


@pytest.mark.parametrize("make", [foreign_folder, foreign_record, added_file, plain_file, dangling_link])
def test_what_is_not_only_an_export_is_left_alone(make: Any, run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="left as it is") as error:
        export_run(run, out=out)
    assert str(out) in error.value.paragraph
    assert contents(tmp_path) == before


def test_a_run_directory_is_never_replaced_by_its_export(run: RunDirectory) -> None:
    (run.root / "conversion.json").write_text(json.dumps({"files": {"config.json": ""}}))
    before = contents(run.root)
    with pytest.raises(InputError, match="left as it is"):
        export_run(run, out=run.root)
    assert contents(run.root) == before


def test_a_place_that_cannot_be_written_is_named(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written") as error:
        export_run(run, out=tmp_path / "file" / "export")
    assert str(tmp_path / "file" / "export") in error.value.paragraph


def test_a_full_disk_is_said_and_the_older_export_stays(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    export_run(run)
    before = contents(run.root)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_safetensors", "write_json", "write_text", "fsync_directory"):
        with monkeypatch.context() as patch:
            patch.setattr(export_module, name, full)
            with pytest.raises(InputError, match="No space left on device"):
                export_run(run)
        assert contents(run.root) == before


def test_an_interruption_leaves_the_older_export_and_no_litter(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(run)
    before = contents(run.root)

    def interrupted(*_: Any) -> Iterator[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "check_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(run)
    assert contents(run.root) == before


def test_a_run_without_checkpoint_or_tokenizer_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(InputError, match="not a run directory"):
        export_run(run)
    run.write_recipe(tiny_recipe())
    with pytest.raises(InputError, match="no finished checkpoint"):
        export_run(run)
    add_checkpoint(run, tiny_recipe(), 1)
    with pytest.raises(InputError, match="tokenizer"):
        export_run(run)
    assert not run.export.exists()
