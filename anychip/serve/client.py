"""A model behind an OpenAI-compatible server as evaluations ask it (a `LanguageModel`)."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from anychip.errors import InputError
from anychip.evals.language_model import Likelihood, cut, move_spaces

_AT_ONCE, _SECONDS = 8, 600
_MOST_STOPS = 4  # that OpenAI's API takes


class ServerModel:
    """`url` ends in /v1. Log-likelihoods need `echo` with `logprobs`, which `anychip serve` and vLLM have. The key, if
    the server wants one, is taken from OPENAI_API_KEY."""

    def __init__(self, url: str, *, chat: bool = False) -> None:
        """Raises InputError when nothing answers there."""
        self._url, self._chat = url.rstrip("/"), chat
        models = self._call("/models", None)["data"]
        self._model = str(models[0]["id"])
        self._lengths: dict[str, int] = {}

    @property
    def name(self) -> str:
        return f"{self._model} at {self._url}"

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        if self._chat:
            raise InputError(
                "a server gives no log-likelihood of answers in chat.", where=self._url, do="Leave --chat out."
            )
        pairs = [move_spaces(*pair) for pair in pairs]
        if not all(context for context, _ in pairs):
            raise InputError("a server gives no log-likelihood behind an empty context.", where=self._url)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            contexts = sorted({context for context, _ in pairs} - self._lengths.keys())
            lengths = pool.map(lambda context: len(self._echo(context)["tokens"]), contexts)
            self._lengths |= dict(zip(contexts, lengths, strict=True))
            return list(pool.map(lambda pair: self._likelihood(*pair), pairs))

    def generate(self, prompts: Sequence[str], stops: Sequence[str], max_new_tokens: int) -> list[str]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda prompt: self._continue(prompt, stops, max_new_tokens), prompts))

    def _continue(self, prompt: str, stops: Sequence[str], max_new_tokens: int) -> str:
        asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_new_tokens}
        if stops:
            asked["stop"] = list(stops)[:_MOST_STOPS]
        if self._chat:
            asked["messages"] = [{"role": "user", "content": prompt}]
            text = self._post("/chat/completions", asked)["message"]["content"]
        else:
            text = self._post("/completions", {**asked, "prompt": prompt})["text"]
        return cut(text or "", stops)

    def _likelihood(self, context: str, continuation: str) -> Likelihood:
        found, start = self._echo(context + continuation), self._lengths[context]
        values, tokens, tops = (found[key][start:] for key in ("token_logprobs", "tokens", "top_logprobs"))
        greedy = all(top[token] >= max(top.values()) if token in top else False
                     for token, top in zip(tokens, tops, strict=True))  # fmt: skip
        return Likelihood(sum(values), greedy)

    def _echo(self, text: str) -> dict[str, Any]:
        asked = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0.0}
        found: dict[str, Any] = self._post("/completions", asked)["logprobs"]
        return found

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = self._call(path, {"model": self._model, **body})["choices"][0]
        return choice

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise InputError(
                f"answers with status {error.code}: {error.read(500).decode(errors='replace')}", where=self._url + path
            ) from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise InputError(f"does not answer ({error}).", where=self._url + path, do="Is the server up?") from None
        return found
