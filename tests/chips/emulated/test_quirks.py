"""ANYCHIP_EMULATED is read as written, and what it does not know is refused."""

from __future__ import annotations

import pytest

from anychip.chips.emulated.backend import EmulatedBackend
from anychip.chips.emulated.quirks import VARIABLE, WORST, Quirks
from anychip.errors import InputError


@pytest.mark.parametrize(
    ("text", "quirks"),
    [
        ("", Quirks()),
        ("no_avg, no_fp64", Quirks(no_avg=True, no_fp64=True)),
        ("memory=2GB,slow_links=1GB/s", Quirks(memory=2_000_000_000, slow_links=1_000_000_000)),
        ("memory=1.5GiB", Quirks(memory=3 * 2**29)),
        ("memory=64KiB", Quirks(memory=65536)),
        ("devices=2", Quirks(devices=2)),
        ("worst", WORST),
        ("worst,memory=0", Quirks(**{**WORST.__dict__, "memory": 0})),
    ],
)
def test_text_is_read_as_it_is_meant(text: str, quirks: Quirks) -> None:
    assert Quirks.parse(text) == quirks


@pytest.mark.parametrize(
    "text",
    ["no_such", "memory", "memory=many", "memory=-1", "memory=1e400", "no_avg=yes", "devices=0", "devices=65",
     "devices=1KB", "worst=1", "memory=2GB/s"],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match=VARIABLE):
        Quirks.parse(text)


def test_the_worst_chip_has_every_quirk() -> None:
    plain = Quirks()
    assert all(value != getattr(plain, name) for name, value in WORST.__dict__.items() if name != "devices")


def test_the_backend_says_what_its_collectives_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "no_avg,no_int64_reduce")
    collectives = EmulatedBackend().facts.collectives
    assert not collectives.reduces("AVG", "float32")
    assert not collectives.reduces("SUM", "int64")
    assert collectives.reduces("SUM", "float32")
    assert collectives.reduces("PREMUL_SUM", "float32")
