"""The verifier is small, needs little, and survives whatever it is given."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attested_run import Attested
from forging import CHAIN, ROLES, Forgery, key_of, reasons, sign_again

import anychip.attest.check as check
from anychip.attest.check.findings import Problem, canonical, parse
from anychip.attest.check.history import objection, read_history
from anychip.attest.check.release import about
from anychip.attest.check.signatures import PREDICATE, open_envelope, signed_files

LARGEST = 600
ANYTHING: list[Any] = [None, True, 0, -1, 2**63, 1.5, "", "x" * 70, "f" * 64, [], {}, [[]], {"a": {}}, "\ud800", [1, 2]]


def test_it_can_be_read_in_an_hour() -> None:
    """All lines: blank ones, comments and docstrings too."""
    lines = [line for path in Path(check.__file__).parent.glob("*.py") for line in path.read_text().splitlines()]
    assert len(lines) <= LARGEST


@pytest.mark.parametrize("rounds", [2_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_no_input_makes_it_fail(attested: Attested, tmp_path: Path, rounds: int) -> None:
    """Every part of it gets bytes turned over, JSON with values of other types, fields left out, and noise."""
    chance = random.Random(rounds)
    pristine = Forgery.of(attested.release)
    targets = [name for name in pristine.files if name.startswith("attestation/")]
    objects = {Path(name).stem: data for name, data in pristine.files.items() if "/objects/" in name}
    operator = key_of(attested, "operator")
    key = operator.public
    for _ in range(rounds):
        name = chance.choice(targets)
        data = chance.choice([turn_over, retype, noise])(pristine.files[name], chance)
        feed(name, data, pristine, objects, key)
    for number in range(min(rounds // 20, 500)):  # and all of it together, in a folder
        name = chance.choice(targets)
        files = {**pristine.files, name: chance.choice([turn_over, retype, noise])(pristine.files[name], chance)}
        folder = Forgery(files).write(tmp_path / str(number))
        assert reasons(folder, attested, *ROLES) or files[name] == pristine.files[name]
        if "/objects/" not in name:  # a signer may sign anything
            sign_again(folder, operator)
            reasons(folder, attested, *ROLES)


def feed(name: str, data: bytes, pristine: Forgery, objects: dict[str, bytes], key: Any) -> None:
    """Hand the bytes to that part of the verifier which reads such a file. Anything but Problem is a bug."""
    try:
        if name == CHAIN:
            history = read_history(data, objects)
        elif "/objects/" in name:
            history = read_history(pristine.files[CHAIN], {**objects, Path(name).stem: data})
        elif name.endswith("model.sig"):
            signed_files(data, name, key)
            return
        else:
            open_envelope(parse(data, name), name, [key], PREDICATE)
            return
        about("data-owner", history)
        about("chip-vendor", history)
    except Problem:
        pass


def turn_over(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def noise(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    pieces = [b"[" * 5000, b"\x00\xff", b'{"a":1e999}', b"9" * 5000, b"\n", b'"' * 9, data[:50], b""]
    return data[:at] + chance.choice(pieces) + data[at + chance.randrange(40) :]


def retype(data: bytes, chance: random.Random) -> bytes:
    """One value somewhere in one line of JSON is another one, or gone; hashes of lines behind it fit again."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    try:
        value = json.loads(lines[at])
        change_somewhere(value, chance)
        lines[at] = canonical(value)
    except ValueError:
        pass
    return b"\n".join(lines)


def change_somewhere(value: Any, chance: random.Random) -> None:
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        if chance.random() < 0.2:
            del value[key]
        else:
            value[key] = chance.choice(ANYTHING)
        return


@pytest.mark.parametrize("value", ANYTHING)
@pytest.mark.parametrize("act", [lambda v: open_envelope(v, "it", [], PREDICATE), lambda v: objection(v, v)])
def test_values_of_any_type_are_refused(value: Any, act: Callable[[Any], Any]) -> None:
    with pytest.raises(Problem):
        act(value)


@pytest.mark.parametrize("text", [b"", b"{", b"{ }", b'{"a":1,"a":1}', b"NaN", b"[1e999]", b"[" * 100_000, b'"\\ud800"',
                                  b"\xff", b'{"b":1,"a":1}', b"1" * 5000])  # fmt: skip
def test_only_canonical_json_is_read(text: bytes) -> None:
    with pytest.raises(Problem):
        parse(text, "it")
