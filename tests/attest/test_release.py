"""A release holds everything, is accepted by whoever was given the keys, and is refused while a part is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from attested_run import Attested
from forging import ROLES, reasons
from jsonschema import Draft7Validator
from referencing import Registry, Resource

from anychip.attest.check.__main__ import describe
from anychip.attest.check.release import check_release
from anychip.attest.check.signatures import signed_files
from anychip.attest.keys import load_key
from anychip.attest.release import make_release
from anychip.errors import InputError, UnfitError
from anychip.interchange.load import load_for_inference
from anychip.rundir import RunDirectory

MODEL_SIGNING = shutil.which("model_signing")  # of the OpenSSF: pip install model-signing, anywhere on PATH


def test_the_genuine_release_is_accepted_and_says_what_that_means(attested: Attested) -> None:
    findings, _ = check_release(attested.release, attested.public(*ROLES))
    told = describe(findings)
    assert told.startswith("ACCEPTED"), told
    for shown in ("2 starts", "policy: allow_vendors cpu", "pretrain step 12", "From pretrain step 0 on: code "):
        assert shown in told.split("Not shown")[0]
    assert "Whose data it is" not in told and "could have recorded something else" in told.split("Not shown")[1]


def test_each_signer_who_was_not_asked_is_said_to_be_missing(attested: Attested) -> None:
    findings, _ = check_release(attested.release, attested.public("operator"))
    assert findings.problems == []
    assert sum("was asked to sign" in text for text in findings.not_shown) == 2


def test_without_a_key_nothing_is_accepted(attested: Attested) -> None:
    findings, _ = check_release(attested.release, {})
    assert [problem.reason for problem in findings.problems] == ["key"]


def test_the_weights_can_be_loaded(attested: Attested) -> None:
    assert load_for_inference(attested.release).config.hidden_size == 32


def test_the_model_card_says_on_what_and_how_long(attested: Attested) -> None:
    card = (attested.release / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    for part in ("device-hours", "energy: not estimated", "layout: one process", "- pretrain: trained to step 12",
                 "corpus words", "bits per byte", "anychip attest check", "No report of `anychip probe`"):  # fmt: skip
        assert part in card, part


def test_the_bill_of_materials_fits_its_schema(attested: Attested) -> None:
    folder = resources.files("cyclonedx") / "schema" / "_res"
    registry: Any = Registry()
    for name in ("spdx", "jsf-0.82"):
        content = json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text(encoding="utf-8"))
        resource = Resource.from_contents(content)
        for base in ("", "http://cyclonedx.org/schema/"):
            registry = registry.with_resource(f"{base}{name}.SNAPSHOT.schema.json", resource)
    schema = json.loads((folder / "bom-1.6.SNAPSHOT.schema.json").read_text(encoding="utf-8"))
    bom = json.loads((attested.release / "mlbom.cdx.json").read_text(encoding="utf-8"))
    errors = [f"{list(e.path)}: {e.message[:200]}" for e in Draft7Validator(schema, registry=registry).iter_errors(bom)]
    assert errors == []
    kinds = {component["type"] for component in bom["components"]}
    assert kinds == {"data", "library", "device"} and bom["metadata"]["component"]["modelCard"]["modelParameters"]
    assert any(component["name"] == "torch" for component in bom["components"])


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("export/conversion.json", "anychip export"),
        ("eval.json", "anychip eval"),
        ("data/summary.json", "anychip data prepare"),
        ("attest/chain.jsonl", "attest.record=true"),
    ],
)
def test_a_missing_part_is_named(attested: Attested, tmp_path: Path, path: str, named: str) -> None:
    run = RunDirectory(Path(shutil.copytree(attested.run.root, tmp_path / "run")))
    (run.root / path).unlink()
    with pytest.raises(InputError, match=named):
        make_release(run, None, attested.keys["operator"])
    assert not (run.root / "release").exists()


def test_a_missing_key_and_licence_are_named_together(attested: Attested, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(attested.run.root, tmp_path / "run")))
    text = run.recipe_path.read_text(encoding="utf-8").replace("license: apache-2.0", "license: other")
    run.recipe_path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"licence.*; the operator's key"):
        make_release(run, None, None)


def test_an_export_that_was_changed_is_not_released(attested: Attested, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(attested.run.root, tmp_path / "run")))
    (run.export / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnfitError, match="not the file that was exported"):
        make_release(run, None, attested.keys["operator"])


def test_weights_of_another_checkpoint_are_not_released(attested: Attested, tmp_path: Path) -> None:
    run = RunDirectory(Path(shutil.copytree(attested.run.root, tmp_path / "run")))
    record = json.loads((run.export / "conversion.json").read_text(encoding="utf-8"))
    record["source"]["manifest"] = "0" * 64
    (run.export / "conversion.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UnfitError, match="not those of a checkpoint of this chain"):
        make_release(run, None, attested.keys["operator"])


def test_an_ed25519_key_does_not_sign_weights(attested: Attested, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keygen --kind ecdsa"):
        make_release(attested.run, tmp_path / "release", attested.keys["data-owner"])


def test_reports_of_probes_come_along(attested: Attested, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text('{"verdict": "fit"}', encoding="utf-8")
    release = make_release(attested.run, tmp_path / "r", attested.keys["operator"], None, [tmp_path / "probe.json"])
    assert "`verification/probe.json`: fit" in (release / "README.md").read_text(encoding="utf-8")
    assert reasons(release, attested, "operator") == set()


def test_the_checker_runs_without_the_rest(attested: Attested) -> None:
    """As a third party would run it: no torch, nothing of anychip but its folder, and nobody to ask."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['check', {str(attested.release)!r}, '--operator', {str(attested.keys['operator'])!r}]\n"
        "sys.argv[-1] = sys.argv[-1].replace('.pem', '.pub.pem')\n"
        "try:\n    runpy.run_module('anychip.attest.check', run_name='__main__')\n"
        "except SystemExit as end:\n    print('exit', end.code)\n"
        "foreign = {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(n for n in foreign if not n.startswith(('_', 'sitecustom', 'distutils'))))\n"
        "print(sorted(n for n in sys.modules if n.startswith('anychip.') and 'attest' not in n))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    lines = done.stdout.splitlines()
    assert lines[0] == "ACCEPTED" and lines[-3] == "exit 0", done.stderr
    assert set(eval(lines[-2])) <= {"anychip", "cryptography", "cffi"} and lines[-1] == "[]"


@pytest.mark.skipif(MODEL_SIGNING is None, reason="the OpenSSF's model_signing is not installed")
def test_the_openssf_tool_reads_our_signature_and_we_read_its(attested: Attested, tmp_path: Path) -> None:
    assert MODEL_SIGNING
    release, public = attested.release, str(attested.keys["operator"].with_suffix(".pub.pem"))
    signature = str(release / "attestation" / "model.sig")
    verify = [MODEL_SIGNING, "verify", "key", str(release), "--signature", signature, "--public_key", public]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    (copy / "config.json").write_text("{}", encoding="utf-8")
    done = subprocess.run([*verify[:3], str(copy), *verify[4:]], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    theirs, private = tmp_path / "theirs.sig", str(attested.keys["operator"])
    sign = [MODEL_SIGNING, "sign", "key", str(release), "--signature", str(theirs), "--private_key", private]
    done = subprocess.run([*sign, "--ignore-paths", str(release / "attestation")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = json.loads(theirs.read_text(encoding="utf-8"))
    ours = json.loads(Path(signature).read_text(encoding="utf-8"))
    assert bundle.keys() == ours.keys() and bundle["verificationMaterial"] == ours["verificationMaterial"]
    assert signed_files(Path(signature).read_bytes(), "model.sig", load_key(attested.keys["operator"]).public)
