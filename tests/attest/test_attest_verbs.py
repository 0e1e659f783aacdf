"""The verbs as a user types them, keys, and what drivers say of chips."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from attested_run import Attested
from typer.testing import CliRunner

from anychip.attest.keys import PASSPHRASE_VARIABLE, load_key, make_key
from anychip.chips.inventory import mapped_libraries, read_tool
from anychip.chips.makers import drivers_among, maker_of, maker_of_processor
from anychip.cli import app
from anychip.errors import InputError


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_a_release_is_made_signed_and_checked(attested: Attested, tmp_path: Path) -> None:
    key, out = tmp_path / "me.pem", tmp_path / "release"
    assert "keep it" in run("attest", "keygen", key)[1]
    assert run("release", attested.run.root, "--key", key, "--out", out) == (0, f"wrote {out}\n")
    owner = attested.keys["data-owner"]
    assert run("attest", "sign", out, "--key", owner, "--as", "data-owner")[0] == 0
    public = tmp_path / "me.pub.pem"
    code, told = run("attest", "check", out, "--operator", public, "--data-owner", owner.with_suffix(".pub.pem"))
    assert code == 0 and told.startswith("ACCEPTED")
    code, told = run("attest", "check", out, "--operator", public, "--replay", 1, "--run", attested.run.root)
    assert code == 0 and "1 steps chosen at random" in told
    (out / "config.json").write_text("{}", encoding="utf-8")
    code, told = run("attest", "check", out, "--operator", public)
    assert code == 3 and told.startswith("REJECTED\n- bytes: config.json")
    code, told = run("attest", "check", out)
    assert code == 3 and "Ask the operator" in told
    told = run("attest", "show", out)[1]
    assert "pretrain  2 " not in told and "Each link follows the one before it" in told and "device-hours" in told


def test_what_cannot_be_used_is_said(attested: Attested, tmp_path: Path) -> None:
    for words, message in {
        ("attest", "check", attested.release, "--operator", tmp_path / "none"): "public key cannot be read",
        ("attest", "check", attested.release, "--operator", attested.release / "LICENSE"): "public key cannot be read",
        ("attest", "check", attested.release, "--replay", 1): "--replay needs --run",
        ("attest", "show", tmp_path): "keeps no chain",
        ("attest", "sign", tmp_path, "--key", attested.keys["operator"]): "not an attested release",
        ("attest", "sign", tmp_path, "--key", tmp_path / "none"): "cannot be read",
        ("attest", "sign", tmp_path, "--key", attested.keys["operator"], "--as", "king"): "Allowed: operator",
        ("attest", "keygen", attested.keys["operator"]): "not overwritten",
        ("attest", "keygen", tmp_path / "k.pem", "--kind", "rsa"): "Allowed: ecdsa, ed25519",
    }.items():
        with pytest.raises(InputError, match=message):
            run(*words)


@pytest.mark.parametrize("kind", ["ecdsa", "ed25519"])
def test_private_keys_are_their_owner_s_alone(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "open sesame")
    path = tmp_path / "key.pem"
    public = make_key(path, kind)  # type: ignore[arg-type]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and b"ENCRYPTED" in path.read_bytes()
    assert public.name == "key.pub.pem" and b"PUBLIC" in public.read_bytes()
    signature = load_key(path).sign(b"payload")
    assert load_key(path).public.verifies(signature, b"payload")
    assert not load_key(path).public.verifies(signature, b"another")
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "wrong")
    with pytest.raises(InputError, match="passphrase is wrong"):
        load_key(path)
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    with pytest.raises(InputError, match=f"Set {PASSPHRASE_VARIABLE}"):
        load_key(path)


NPU_SMI = """
        NPU ID                         : 0
        Product Name                   : Atlas 800T A2
        Model                          : NA
        Manufacturer                   : Huawei
        Serial Number                  : 2102314NMV10P8000012
        Software Version               : 24.1.rc2
        Firmware Version               : 7.5.0.1.129
        Compatibility                  : OK
"""
NVIDIA_SMI = """
Driver Version                                         : 580.159.04
    Serial Number                                      : {serial}
    GPU UUID                                           : GPU-2c570c6e
    VBIOS Version                                      : 96.00.A5.00.01
        Chassis Serial Number                          : N/A
"""


def test_what_tools_print_is_read() -> None:
    """npu-smi's lines are from memory, nvidia-smi's those of an H100."""
    found = {"serial": "2102314NMV10P8000012", "driver": "24.1.rc2", "firmware": "7.5.0.1.129"}
    assert read_tool(NPU_SMI, "ascend") == found
    for serial, read in {"1652824025": "1652824025", "N/A": "GPU-2c570c6e"}.items():
        found = {"serial": read, "driver": "580.159.04", "firmware": "96.00.A5.00.01"}
        assert read_tool(NVIDIA_SMI.format(serial=serial), "nvidia") == found
    assert set(read_tool("no device", "cambricon").values()) == {None}


@pytest.mark.parametrize(
    ("thing", "vendor"),
    [
        ("/usr/local/cuda-12.8/lib64/libcublasLt.so.12", "nvidia"),
        ("/venv/nvidia/cudnn/lib/libcudnn_graph.so.9", "nvidia"),
        ("/usr/local/corex-4.2/lib64/libcudart.so.10.2", "iluvatar"),
        ("/opt/dtk-24.04/lib/libamdhip64.so.6", "hygon"),
        ("/opt/rocm/lib/libamdhip64.so.6", "amd"),
        ("/usr/local/Ascend/lib64/libascendcl.so", "ascend"),
        ("/usr/local/neuware/lib64/libcnrt.so", "cambricon"),
        ("torch==2.9.0+cu128", "nvidia"),
        ("nvidia-nccl-cu12==2.27.3", "nvidia"),
        ("torch-npu==2.7.1", "ascend"),
        ("torch==2.13.0+cpu", None),
        ("nvidia-ml-py==13.0.0", None),
        ("/lib/x86_64-linux-gnu/libc.so.6", None),
    ],
)
def test_software_gives_away_whose_chips_it_drives(thing: str, vendor: str | None) -> None:
    found = drivers_among([thing], []) if thing.startswith("/") else drivers_among([], [thing])
    assert list(found) == ([vendor] if vendor else [])


def test_this_process_has_loaded_something() -> None:
    assert any("libc.so" in path or "libc-" in path or "ld-" in path for path in mapped_libraries())
    assert mapped_libraries(Path(os.devnull)) == []


def test_makers() -> None:
    assert (maker_of("ascend").country, maker_of("nvidia").country) == ("CN", "US")
    assert maker_of("toy", "Toy Works").as_json() == {"vendor": "toy", "maker": "Toy Works", "country": None}
    assert maker_of_processor("AuthenticAMD").name == "AMD" and maker_of_processor("").country is None
