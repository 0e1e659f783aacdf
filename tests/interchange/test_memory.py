"""Conversion of a model larger than the memory it may use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Converts a smaller model first, so that what is measured afterwards grows with the model: not imports, not threads.
PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from tiny_models import tiny_recipe, tiny_tokenizer
from anychip.interchange.export import export_run
from anychip.interchange.import_model import import_model
from anychip.interchange.initialize import init_model
from anychip.model.arithmetic import num_parameters
from anychip.rundir import RunDirectory

torch.set_num_threads(1)
place = Path(sys.argv[1])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def convert(name, model):
    export = {"dtype": "fp32", "max_shard_bytes": 20_000_000}
    recipe = tiny_recipe(name, model, export=export)
    run = RunDirectory(place / name)
    run.write_recipe(recipe)
    tiny_tokenizer().save(run.tokenizer)
    peaks = [peak()]
    init_model(recipe, run)
    peaks.append(peak())
    source = export_run(run)
    peaks.append(peak())
    tokenizer = {"kind": "json", "path": str(source / "tokenizer.json")}
    data = {"sources": [{"name": "words", "path": "corpus"}], "tokenizer": tokenizer}
    again = tiny_recipe(name + "-again", model, export=export, data=data)
    import_model(source, again, RunDirectory(place / again.name))
    peaks.append(peak())
    return recipe.model, peaks

large = json.loads(sys.argv[2])
convert("small", {**large, "num_hidden_layers": 12})
model, peaks = convert("large", large)
print(json.dumps({"bytes": 4 * num_parameters(model), "peaks": peaks}))
"""


@pytest.mark.slow
def test_peak_memory_is_a_few_tensors(tmp_path: Path) -> None:
    model = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 8,
             "num_key_value_heads": 8}  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(model)]
    # Freed memory goes back to the system at once, so that the peak shows what was held.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", **allocator}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    one_layer = measured["bytes"] / model["num_hidden_layers"]
    growth = measured["peaks"][-1] - measured["peaks"][0]
    assert measured["bytes"] > 500e6
    assert growth < 7 * one_layer, (growth, measured)
