"""`anychip serve --engine vllm`: an export is handed to `vllm serve`, on Ascend with the plug-in vllm-ascend.

The flags are those that vLLM 0.12 to 0.26 document. Not run against vLLM here: a stand-in records what it is given. Its
key goes by the environment, where the list of processes does not show it; it takes one that way. Scripts of other sites
are let in by name only, where vLLM by itself lets in all.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anychip.errors import InputError
from anychip.interchange.published import read_json_object
from anychip.serve.api.keys import check_open, key_texts
from anychip.serve.talker import WeightType

_KNOWN = ("llama", "mixtral", "deepseek_v3")  # model_type of the configurations that need no remote code
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}


def serve_by_vllm(
    path: Path,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Path | None = None,
    origins: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    weights: WeightType = "auto",
    max_batch: int | None = None,
    context_length: int | None = None,
    thinking: bool = False,
    more: Sequence[str] = (),
) -> None:
    """Replace this process by vLLM's server; `more` are words of its own command line."""
    keys = key_texts(api_keys)
    check_open(host, bool(keys))
    _check(path, keys, weights)
    program = shutil.which("vllm")
    if program is None:
        raise InputError(
            "vLLM is not installed here.",
            where="--engine vllm",
            do="Install vllm (on Ascend vllm-ascend too), or leave --engine out to use anychip's own engine.",
        )
    words = ["--host", host, "--port", str(port), "--served-model-name", name or path.resolve().name]
    words += ["--allowed-origins", json.dumps(list(origins)), "--dtype", _DTYPES[weights]]
    if context_length is not None:
        words += ["--max-model-len", str(context_length)]
    if max_batch is not None:
        words += ["--max-num-seqs", str(max_batch)]
    if sampling:
        words += ["--override-generation-config", json.dumps(dict(sampling))]
    if thinking:
        words += ["--reasoning-parser", "deepseek_r1"]
    if keys:
        print(
            "note: vLLM asks for the key below /v1 alone; let a proxy before it pass nothing else on", file=sys.stderr
        )
    environment = {**os.environ, "VLLM_API_KEY": keys[0]} if keys else dict(os.environ)
    os.execve(program, [program, "serve", str(path), *words, *more], environment)


def _check(path: Path, keys: Sequence[str], weights: WeightType) -> None:
    """InputError for what vLLM does not read or does not do."""
    if not (path / "config.json").is_file():
        raise InputError(
            "is not an exported model, which is what vLLM loads.",
            where=path,
            do="Export the run first: anychip export RUN, then serve that directory.",
        )
    kind = read_json_object(path / "config.json").get("model_type")
    if kind not in _KNOWN:
        raise InputError(
            f"has model_type {kind!r}, which vLLM reads only by code that comes with a model; that is not run here.",
            where=path / "config.json",
            do="Set export.layout to llama and export again.",
        )
    refused = {
        "more than one API key": len(keys) > 1,
        "--weights int8": weights not in _DTYPES,
        "several processes of torchrun": int(os.environ.get("WORLD_SIZE", "1")) > 1,
    }
    for what, asked in refused.items():
        if asked:
            raise InputError(
                f"vLLM is not given {what}.",
                where="--engine vllm",
                do="Leave that out. Words behind -- go to vLLM as they are, such as -- --tensor-parallel-size 8.",
            )
