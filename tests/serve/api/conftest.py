"""A tiny model behind a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from anychip.data.tokenizer import Tokenizer, train_bpe
from anychip.model.decoder import Decoder
from anychip.recipe.schema import ModelConfig, SamplingConfig
from anychip.serve.api.keys import Keys
from anychip.serve.api.limits import Limits
from anychip.serve.api.server import make_server
from anychip.serve.api.service import Service
from anychip.serve.talker import make_talker

from ..conftest import Loaded, random_decoder

TEXT = ['{"name": "weather", "arguments": {"city": "Paris"}} the cat sat on the mat, 猫坐在垫子上 <_end><think> ' * 8]


@dataclass
class Served:
    """A running server; `get` and `post` are httpx's, with its address before the path."""

    url: str
    service: Service
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)  # type: ignore[arg-type]

    def post(self, path: str, body: object = None, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)  # type: ignore[arg-type]

    def chat(self, content: str = "the cat", **fields: object) -> httpx.Response:
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        return self.post("/v1/chat/completions", {"messages": messages, **fields})


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXT, vocab_size=320)


def tiny_decoder(context: int = 512) -> Decoder:
    return random_decoder(
        ModelConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
        )
    )


Serve = Callable[..., Served]


def _start(service: Service, keys: list[str], **options: object) -> Served:
    server = make_server(service, Keys(keys), "127.0.0.1", 0, drain_seconds=1, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    for _ in range(600):
        if server.started:
            break
        thread.join(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    return Served(f"http://127.0.0.1:{port}", service, server, thread)


@pytest.fixture(scope="session")
def serve(tokenizer: Tokenizer) -> Iterator[Serve]:
    """Starts servers, which end with the session."""
    started: list[Served] = []

    def serve(
        keys: list[str] | None = None,
        limits: Limits | None = None,
        thinking: bool = False,
        context: int = 2048,
        max_batch: int = 4,
        **options: object,
    ) -> Served:
        loaded = Loaded(tiny_decoder(context), tokenizer, SamplingConfig(max_new_tokens=16))
        talker = make_talker(loaded, {}, max_batch=max_batch, prefill_tokens=64)
        service = Service(talker, "tiny", limits or Limits(), thinking=thinking)
        started.append(_start(service, keys or [], **options))
        return started[-1]

    yield serve
    for one in started:
        one.server.should_exit = True
    for one in started:
        one.thread.join(10)


@pytest.fixture(scope="session")
def served(serve: Serve) -> Served:
    return serve()
