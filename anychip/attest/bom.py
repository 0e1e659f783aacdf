"""A machine-learning bill of materials: CycloneDX 1.6 (ECMA-424) with a model card, as JSON.

The Python library of CycloneDX has no model cards, so the document is written here; a test checks it against the schema
that the library brings.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from anychip import __version__
from anychip.attest.check.findings import canonical, sha256
from anychip.attest.check.history import History
from anychip.model.arithmetic import num_parameters
from anychip.recipe import Recipe

SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT"}  # Hugging Face's names to SPDX's
_MODEL = "model"


def bill_of_materials(
    recipe: Recipe, history: History, weights: Mapping[str, str], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """`weights` are files and their SHA-256. The time is that of the last link, so equal releases give equal bytes."""
    starts = [link["body"] for link in history.links if link["kind"] == "start"]
    inputs = history.lookup(starts[-1]["inputs"], "inputs")
    ranks = [rank for body in starts for rank in history.lookup(body["members"], "members")["ranks"]]
    data = list(_data(inputs["data"]))
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": history.links[-1]["time"],
            "tools": {"components": [{"type": "application", "name": "anychip", "version": __version__}]},
            "component": _model(recipe, weights, [entry["bom-ref"] for entry in data], evaluation),
        },
        "components": [*data, *_software(inputs["environment"]["distributions"]), *_chips(ranks)],
        "dependencies": [{"ref": _MODEL, "dependsOn": [entry["bom-ref"] for entry in data]}],
    }
    return {**document, "serialNumber": f"urn:uuid:{uuid.UUID(sha256(canonical(document))[:32])}"}


def _model(
    recipe: Recipe, weights: Mapping[str, str], datasets: list[str], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    spdx = SPDX.get(recipe.export.license)
    metrics = [
        {"type": "bits_per_byte", "value": f"{value['bits_per_byte']:.4f}", "slice": name}
        for name, value in evaluation.items()
        if isinstance(value, dict) and isinstance(value.get("bits_per_byte"), float)
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": recipe.name,
        "licenses": [{"license": {"id": spdx} if spdx else {"name": recipe.export.license}}],
        "components": [
            {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": _hashes(digest)}
            for name, digest in weights.items()
        ],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "self-supervised"},
                "task": "text-generation",
                "architectureFamily": "transformer decoder",
                "modelArchitecture": recipe.final_model.family,
                "datasets": [{"ref": ref} for ref in datasets],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": metrics},
            "considerations": {
                "technicalLimitations": ["It has not been aligned or tested for safety; do not rely on its answers."]
            },
            "properties": [{"name": "anychip:parameters", "value": str(num_parameters(recipe.final_model))}],
        },
    }


def _data(digests: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for name, digest in sorted(digests.items()):
        kind = "other" if name == "tokenizer" else "dataset"
        yield {
            "type": "data",
            "bom-ref": f"data:{name}",
            "name": name,
            "hashes": _hashes(digest),
            "data": [{"type": kind, "name": name}],
        }


def _software(distributions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for found in {(entry["name"], entry["version"]): entry for entry in distributions}.values():
        purl = f"pkg:pypi/{found['name'].replace('_', '-')}@{found['version'].replace('+', '%2B')}"
        record = [{"name": "anychip:record_sha256", "value": found["record"]}] if found["record"] else []
        yield {
            "type": "library",
            "bom-ref": purl,
            "name": found["name"],
            "version": found["version"],
            "purl": purl,
            "properties": record,
        }


def _chips(ranks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    kinds = {(rank["maker"], rank["model"], rank["driver"] or "", rank["firmware"] or "") for rank in ranks}
    for number, (maker, model, driver, firmware) in enumerate(sorted(kinds), start=1):
        told = {"driver": driver, "firmware": firmware}
        yield {
            "type": "device",
            "bom-ref": f"chip:{number}",
            "name": model,
            "manufacturer": {"name": maker},
            "properties": [{"name": f"anychip:{name}", "value": value} for name, value in told.items() if value],
        }


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]
