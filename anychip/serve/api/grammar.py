"""Answers of a required form: a JSON schema or a tool call, by llguidance, which says what may come next.

A schema comes from a stranger. Its size is limited, the work of its parser is limited by llguidance, and whoever
asked waits for it no longer than a few seconds, in a thread beside the service.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from anychip.data.tokenizer import JsonTokenizer, Tokenizer
from anychip.serve.api.conversation import END_TOOL_CALL, TOOL_CALL
from anychip.serve.api.errors import ApiError
from anychip.serve.api.limits import MAX_SCHEMA_BYTES

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarConstraint:
    """One answer's place in a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, logits: Tensor) -> Tensor:
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)
        known = torch.from_numpy(allowed[: len(logits)].copy()).to(logits.device).bool()
        if len(known) < len(logits):  # rows of the model that are no token
            known = torch.cat((known, known.new_zeros(len(logits) - len(known))))
        return logits.masked_fill(~known, -torch.inf)

    def accept(self, token: int) -> bool:
        return self._matcher.consume_token(token) and not self._matcher.is_stopped()


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, seconds: float) -> None:
        self._special = tokenizer.special_tokens
        self._tokenizer = _for_llguidance(tokenizer, vocab_size)
        self._seconds = seconds
        self._busy = asyncio.Semaphore(2)  # a schema that never ends holds a thread, and two at most

    async def json(self, schema: Mapping[str, Any] | None, count: int) -> list[GrammarConstraint]:
        """Constraints of `count` answers: a JSON object, or what the schema says."""
        _check_size(schema or {})
        return await self._constraints(json.dumps({"grammars": [{"json_schema": schema or _ANY_OBJECT}]}), count)

    async def calls(
        self, tools: Mapping[str, Mapping[str, Any]], count: int, *, parallel: bool
    ) -> list[GrammarConstraint]:
        """One or several calls of these tools, and nothing else."""
        _check_size(tools)
        records = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": schema or _ANY_OBJECT},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, schema in tools.items()
        ]
        rules = "\n".join(f"call_{number}: %json {json.dumps(record)}" for number, record in enumerate(records))
        either = " | ".join(f"call_{number}" for number in range(len(records)))
        more = f'("\\n" {self._tag(TOOL_CALL)} "\\n" call "\\n" {self._tag(END_TOOL_CALL)})*' if parallel else ""
        start = f'start: {self._tag(TOOL_CALL)} "\\n" call "\\n" {self._tag(END_TOOL_CALL)} {more}'
        grammar = llguidance.LLMatcher.grammar_from_lark(f"{start}\ncall: {either}\n{rules}\n")
        return await self._constraints(grammar, count)

    def _tag(self, tag: str) -> str:
        return tag if tag in self._special else json.dumps(tag)

    async def _constraints(self, grammar: str, count: int) -> list[GrammarConstraint]:
        async def compile_in_turn() -> list[llguidance.LLMatcher]:
            async with self._busy:
                return await asyncio.shield(asyncio.to_thread(self._compile, grammar, count))

        try:
            matchers = await asyncio.wait_for(compile_in_turn(), self._seconds)
        except asyncio.TimeoutError:
            raise ApiError(400, "The schema takes too long to prepare.", code="schema_too_complex") from None
        if matchers[0].is_error():
            raise ApiError(400, "The schema cannot be used: it is not valid, or too complex.", code="invalid_schema")
        return [GrammarConstraint(matcher) for matcher in matchers]

    def _compile(self, grammar: str, count: int) -> list[llguidance.LLMatcher]:
        first = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        return [first, *(first.deep_copy() for _ in range(count - 1))]


def _check_size(schema: Mapping[str, Any]) -> None:
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise ApiError(400, f"The schema is larger than {MAX_SCHEMA_BYTES:,} bytes.", code="schema_too_complex")


class _Pieces:
    """What llguidance asks of a tokenizer that is no tokenizer.json."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = frozenset(tokenizer.special_tokens.values())
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids: Sequence[int] = sorted(special)
        self.tokens = [_bytes_of(tokenizer, index, index in special) for index in range(tokenizer.vocab_size)]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _bytes_of(tokenizer: Tokenizer, index: int, special: bool) -> bytes:
    if special:
        names = [name for name, known in tokenizer.special_tokens.items() if known == index]
        return names[0].encode()
    context = tokenizer.encode("a")  # a piece may decode differently at the very start
    return tokenizer.decode([*context, index]).removeprefix(tokenizer.decode(context)).encode()


def _for_llguidance(tokenizer: Tokenizer, vocab_size: int) -> llguidance.LLTokenizer:
    if isinstance(tokenizer, JsonTokenizer):
        return llguidance.LLTokenizer(tokenizer.serialized, n_vocab=vocab_size, eos_token=tokenizer.eos_id)
    wrapper = llguidance.TokenizerWrapper(_Pieces(tokenizer))
    return llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=tokenizer.eos_id)
