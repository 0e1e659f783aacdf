"""Options of `supervise` that cannot work are refused at once, with exit code 2 and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from many_hosts import free_port
from tiny_run import start, write_tiny_recipe
from typer.testing import CliRunner

from anychip.cli import app
from anychip.errors import InputError
from anychip.supervise.many_hosts import Place, own_address

FOREIGN = "192.0.2.7"  # kept for documentation (RFC 5737): no host has it


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("anychip.train.output.print_what_fits", lambda: None)  # the output here is no file
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("a secret of sixteen bytes or more")
    (tmp_path / "token").chmod(0o600)
    return str(write_tiny_recipe(tmp_path))


def refusal(recipe: str, *words: str) -> str:
    result = CliRunner().invoke(app, ["supervise", recipe, *words])
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def hosts(coordinator: str, *more: str) -> list[str]:
    return ["--nodes", "1:2", "--coordinator", coordinator, "--token-file", "token", *more]


def test_an_address_of_another_host(recipe: str) -> None:
    text = refusal(recipe, *hosts(f"127.0.0.1:{free_port()}", "--bind", FOREIGN))
    assert f"--bind: {FOREIGN} cannot be listened on here" in text
    assert "--interface" in text
    assert "cannot be listened on" in refusal(recipe, *hosts("127.0.0.1:9", "--bind", FOREIGN, "--coordinate"))


def test_a_coordinator_that_nobody_knows(recipe: str) -> None:
    for more in [], ["--bind", "127.0.0.1"]:
        text = refusal(recipe, *hosts("no-such-host.invalid:9", *more))
        assert "no-such-host.invalid: the coordinator's host name cannot be resolved" in text
        assert "--interface" not in text
    with pytest.raises(InputError, match="cannot be resolved"):
        own_address(Place(("x" * 70 + ".invalid", 9), Path("token")))


def test_more_processes_at_the_least_than_there_are(recipe: str) -> None:
    assert "5 is more than --processes 2" in refusal(recipe, "--processes", "2", "--min-processes", "5")


def test_a_least_number_of_processes_on_several_hosts(recipe: str) -> None:
    assert "is for one host" in refusal(recipe, *hosts("127.0.0.1:9", "--min-processes", "1"))


@pytest.mark.parametrize(
    "words",
    [
        ["--lease", "5"],  # the default too: it was meant
        ["--bind", "127.0.0.1"],
        ["--interface", "lo"],
        ["--token-file", "token"],
        ["--node-name", "a"],
        ["--settle", "1"],
        ["--patience", "9"],
    ],
)
def test_options_of_several_hosts_on_one(recipe: str, words: list[str]) -> None:
    text = refusal(recipe, *words)
    assert text.startswith(f"{words[0]}: ") and "--nodes" in text


def test_what_is_told_on_a_command_line(recipe: str, tmp_path: Path) -> None:
    shutil.copy(recipe, tmp_path / "again.yaml")
    process = start(tmp_path, "supervise", "again.yaml", "--min-processes", "5")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("anychip: --min-processes: 5 is more") and err.count("\n") == 1
