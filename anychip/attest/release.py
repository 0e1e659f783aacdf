"""`anychip release`: everything that belongs to published weights in one folder, signed, ready to be uploaded."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from anychip.attest.bom import bill_of_materials
from anychip.attest.card import release_card
from anychip.attest.chain import Chain
from anychip.attest.check.findings import ATTESTATION
from anychip.attest.check.history import History, read_history
from anychip.attest.check.release import check_release
from anychip.attest.check.signatures import sha256_file
from anychip.attest.keys import load_key
from anychip.attest.pins import PACKAGE
from anychip.attest.place import Place
from anychip.attest.sign import sign_files, sign_run
from anychip.errors import InputError, UnfitError
from anychip.files import fsync_directory, write_json, write_text
from anychip.rundir import RunDirectory

CARD, BOM, LICENSE, RECIPE, EVALUATION = (
    "README.md",
    "mlbom.cdx.json",
    "LICENSE",
    "training_recipe.yaml",
    "evaluation.json",
)


def make_release(
    run: RunDirectory,
    out: Path | None,
    key: Path | None,
    license_file: Path | None = None,
    verification: Iterable[Path] = (),
) -> Path:
    """Gather, sign, and check as a third party would; returns the folder (default: RUN/release).

    Raises InputError naming every part that is missing, UnfitError when a part is not what another one says of it.
    """
    recipe, target = run.read_recipe(), out or run.release
    license_file = license_file or _own_license(recipe.export.license)
    _refuse_missing(run, key, license_file, target)
    assert key is not None and license_file is not None
    signer, conversion = load_key(key), _conversion(run)
    reports = {f"verification/{p.name}": p for p in [*verification, *sorted((run.root / "verify").glob("*.json"))]}
    history = _link_export(run, conversion)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / "release"
        folder.mkdir()
        for name in conversion["files"]:
            _copy(run.export / name, folder / name)
        _copy(run.export / "conversion.json", folder / "conversion.json")
        _copy(run.recipe_path, folder / RECIPE)
        _copy(run.evaluation, folder / EVALUATION)
        _copy(license_file, folder / LICENSE)
        for name, path in reports.items():
            _copy(path, folder / name)
        evaluation = json.loads(run.evaluation.read_text(encoding="utf-8"))
        weights = {name: digest for name, digest in conversion["files"].items() if name.endswith(".safetensors")}
        write_json(folder / BOM, bill_of_materials(recipe, history, weights, evaluation))
        write_text(folder / CARD, release_card(recipe, run, conversion, history, reports))
        _copy(Place(run).chain, folder / ATTESTATION / "chain.jsonl")
        for digest in sorted(history.used):
            name = f"objects/{digest}.json"
            _copy(Place(run).folder / name, folder / ATTESTATION / name)
        root = sign_files(folder, recipe.name, signer)
        sign_run(folder, recipe.name, root, signer)
        findings, _ = check_release(folder, {"operator": [signer.public]})
        if findings.problems:
            raise _broken(folder, findings.problems[0].what)
        fsync_directory(folder)
        folder.rename(target)
    fsync_directory(target.parent)
    return target


def _refuse_missing(run: RunDirectory, key: Path | None, license_file: Path | None, target: Path) -> None:
    if target.exists():
        raise InputError("exists and is left as it is.", where=target, do="Remove it, or choose another --out.")
    parts = {
        "the export (`anychip export RUN`)": run.export / "conversion.json",
        "the evaluation (`anychip eval RECIPE`)": run.evaluation,
        "the data's summary (`anychip data prepare RECIPE`)": run.data / "summary.json",
        "the chain (train with attest.record=true)": Place(run).chain,
        "the licence (`--license FILE`)": license_file,
        "the operator's key (`--key FILE`, from `anychip attest keygen`)": key,
    }
    missing = [name for name, path in parts.items() if path is None or not path.is_file()]
    if missing:
        do = "Make them, then run this again."
        raise InputError(f"the release lacks {'; '.join(missing)}.", where=run.root, do=do)


def _conversion(run: RunDirectory) -> dict[str, Any]:
    """What the export says of itself, its files still being those it names."""
    conversion: dict[str, Any] = json.loads((run.export / "conversion.json").read_text(encoding="utf-8"))
    for name, digest in conversion["files"].items():
        path = run.export / name
        if not path.is_file() or sha256_file(path) != digest:
            raise UnfitError("is not the file that was exported.", where=path, do="Export again.")
    if "manifest" not in conversion["source"]:
        do = "Remove it and run `anychip export RUN`."
        raise InputError("does not say which checkpoint it was made from.", where=run.export, do=do)
    return conversion


def _link_export(run: RunDirectory, conversion: dict[str, Any]) -> History:
    """Link the export to the checkpoint it was made from, and read the whole chain. Raises UnfitError."""
    source = conversion["source"]
    files = {**conversion["files"], "conversion.json": sha256_file(run.export / "conversion.json")}
    body = {"stage": source["stage"], "step": source["step"], "manifest": source["manifest"], "files": files}
    with Chain(Place(run).chain) as chain:
        if not chain.links or (chain.links[-1].kind, chain.links[-1].body) != ("export", body):
            chain.append("export", body)
    history = history_of_run(run)
    if history.findings.problems:
        raise _broken(Place(run).chain, history.findings.problems[0].what)
    return history


def history_of_run(run: RunDirectory) -> History:
    """The chain of a run as it stands. Raises InputError when it keeps none."""
    place = Place(run)
    if not place.chain.is_file():
        raise InputError("keeps no chain.", where=run.root, do="Train with attest.record=true.")
    objects = {path.stem: path.read_bytes() for path in place.objects.glob("*.json")}
    return read_history(place.chain.read_bytes(), objects)


def _broken(where: Path, what: str) -> UnfitError:
    return UnfitError(f"the chain does not hold: {what}", where=where, do="Such weights cannot be attested.")


def _own_license(name: str) -> Path | None:
    """The text of the licence that this package has, when the weights have the same."""
    if name != "apache-2.0":
        return None
    beside = PACKAGE.parent / "LICENSE"
    if beside.is_file():
        return beside
    try:
        files = distribution("anychip").files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "LICENSE"), None)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
