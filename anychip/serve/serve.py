"""`anychip serve`: load a model and serve it, with our own engine or by handing the export to vLLM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anychip.errors import InputError
from anychip.serve.talker import WeightType, open_talker


def serve(
    path: Path,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Path | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    weights: WeightType = "auto",
    max_batch: int = 32,
    queue: int | None = None,
    context_length: int | None = None,
    prefill_tokens: int = 512,
    batch_invariant: bool = False,
    thinking: bool = False,
    drain_seconds: int = 30,
) -> None:
    """Serve the model in a run or an export until it is told to end. Returns when all is finished."""
    from anychip.serve.api.keys import read_keys
    from anychip.serve.api.limits import Limits
    from anychip.serve.api.server import is_loopback, run_server
    from anychip.serve.api.service import Service

    keys = read_keys(api_keys)
    if not keys and not is_loopback(host):  # before minutes of loading
        raise InputError(
            f"--host {host} opens the server to others, and there is no API key.",
            where="serve",
            do="Give --api-keys FILE or set ANYCHIP_API_KEYS, or serve on 127.0.0.1.",
        )
    talker = open_talker(
        path,
        sampling or {},
        weights,
        max_batch=max_batch,
        context_length=context_length,
        prefill_tokens=prefill_tokens,
        invariant=batch_invariant,
    )
    limits = Limits() if queue is None else replace(Limits(), queue=queue)
    service = Service(talker, name or path.resolve().name, limits, thinking=thinking)
    run_server(service, keys, host=host, port=port, hosts=hosts, origins=origins, drain_seconds=drain_seconds)


def serve_by_vllm(path: Path, *, name: str | None, host: str, port: int, context_length: int | None) -> None:
    """Replace this process by `vllm serve` on an exported model; on Ascend vllm-ascend plugs itself in."""
    if not (path / "config.json").is_file():
        raise InputError(
            "is not an exported model, which is what vLLM loads.",
            where=path,
            do="Export the run first: anychip export RUN, then serve that directory.",
        )
    program = shutil.which("vllm")
    if program is None:
        raise InputError(
            "vLLM is not installed here.",
            where="--engine vllm",
            do="Install vllm (on Ascend vllm-ascend too), or leave --engine out to use anychip's own engine.",
        )
    command = [program, "serve", str(path), "--host", host, "--port", str(port)]
    command += ["--served-model-name", name or path.resolve().name]
    if context_length is not None:
        command += ["--max-model-len", str(context_length)]
    os.execv(program, command)
