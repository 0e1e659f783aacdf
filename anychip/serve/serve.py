"""`anychip serve`: load a model and serve it with our own engine. `vllm` hands an export to vLLM instead."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anychip.errors import UnfitError
from anychip.serve.talker import Talker, WeightType, open_talker

if TYPE_CHECKING:
    from anychip.serve.parts import FollowingPart
    from anychip.serve.worker import EngineThread


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
    """Serve the model in a run or an export until it is told to end. Returns when all is finished.

    Started by torchrun, each process holds its part of the model, and the first one talks to the world.
    """
    from anychip.serve.api.keys import check_open, read_keys
    from anychip.serve.api.limits import Limits
    from anychip.serve.api.server import run_server
    from anychip.serve.api.service import Service
    from anychip.serve.parts import FollowingPart, join_parts
    from anychip.serve.worker import EngineThread

    keys = read_keys(api_keys)
    check_open(host, bool(keys))  # before minutes of loading
    part, thread = join_parts(), EngineThread()
    prepare = partial(
        open_talker,
        path,
        sampling or {},
        weights,
        max_batch=max_batch,
        context_length=context_length,
        prefill_tokens=prefill_tokens,
        invariant=batch_invariant,
        part=part,
    )
    talker = thread.begin(prepare).result()
    if isinstance(part, FollowingPart):
        _follow(part, talker, thread)
        return
    limits = Limits() if queue is None else replace(Limits(), queue=queue)
    service = Service(talker, name or path.resolve().name, limits, thinking=thinking, thread=thread)
    run_server(service, keys, host=host, port=port, hosts=hosts, origins=origins, drain_seconds=drain_seconds)
    part.end()


def _follow(part: FollowingPart, talker: Talker, thread: EngineThread) -> None:
    """Until the leader has answered all that it will; a signal to end is the leader's to act on."""
    for end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(end, signal.SIG_IGN)
    try:
        thread.begin(lambda: part.follow(talker.engine.model)).result()
    except RuntimeError as error:
        raise UnfitError(
            "the process that leads this server is gone.", where=f"process {part.rank}", do="See what it said."
        ) from error
