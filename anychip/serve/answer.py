"""One answer in the making: which tokens the model has read, which one comes next, when it ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anychip.model.cache import KeyValueCache
from anychip.serve.inference import Piece
from anychip.serve.request import Event, FinishReason, Request, TokenLogprob
from anychip.serve.sampling import choose_token, penalize_occurrence, uniform_draw


@dataclass
class Answer:
    """A running request. `cache` holds the keys and values of the tokens in `read`."""

    request: Request
    cache: KeyValueCache
    read: list[int]
    context_length: int
    pending: list[int]
    """Tokens the model has not read: the rest of the prompt, or the last token of the answer."""
    seen: list[int]
    """Prompt and answer."""
    answered: Counter[int] = field(default_factory=Counter)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.seen) - len(self.request.prompt)

    @property
    def in_prompt(self) -> bool:
        """Whether the model is still reading the prompt."""
        return not self.length

    def piece(self, tokens: int) -> Piece:
        """The next `tokens` pending tokens as a part of a step."""
        return Piece(self.cache, tokens, len(self.seen), every=self.in_prompt and self.request.prompt_logprobs)

    def advance(self, tokens: int, logits: Tensor) -> Event | None:
        """The model has read `tokens` more; fp32 logits [rows, vocab_size] as the piece asked for.

        The event of the next token, or None while the prompt is still being read.
        """
        taken, self.pending = self.pending[:tokens], self.pending[tokens:]
        self.read += taken
        if self.in_prompt and self.request.prompt_logprobs:
            following = self.request.prompt[len(self.read) - tokens + 1 : len(self.read) + 1]
            for token, row in zip(following, logits, strict=False):
                self.prompt_logprobs.append(token_logprob(row, token, self.request.top_logprobs or 0))
        return None if self.pending else self._next(logits[-1])

    def _next(self, logits: Tensor) -> Event:
        """The last event of an answer may carry its last token: with `length` and `context` it does."""
        request, index = self.request, self.length
        prompt_logprobs = self.prompt_logprobs if request.prompt_logprobs and not index else None
        if not bool(logits.isfinite().all()):
            return Event(request.id, None, "error")
        token = self._choose(logits, index)
        if token in request.stop_ids:
            return Event(request.id, None, "stop", prompt_logprobs=prompt_logprobs)
        logprob = None if request.top_logprobs is None else token_logprob(logits, token, request.top_logprobs)
        self.seen.append(token)
        self.answered[token] += 1
        self.pending = [token]
        goes_on = request.constraint is None or request.constraint.accept(token)
        reason: FinishReason | None
        if not goes_on:
            reason = "stop"
        elif index + 1 >= request.sampling.max_new_tokens:
            reason = "length"
        else:
            reason = "context" if len(self.seen) >= self.context_length else None
        return Event(request.id, token, reason, logprob, prompt_logprobs)

    def _choose(self, logits: Tensor, index: int) -> int:
        request = self.request
        logits = penalize_occurrence(logits, self.answered, request.presence_penalty, request.frequency_penalty)
        if request.logit_bias:
            tokens = torch.tensor(list(request.logit_bias), device=logits.device)
            logits = logits.index_add(0, tokens, logits.new_tensor(list(request.logit_bias.values())))
        if request.constraint is not None:
            logits = request.constraint.mask(logits)
        draw = uniform_draw(request.seed, request.draws or request.id, index)
        return choose_token(logits, self.seen, request.sampling, draw)


def token_logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """From fp32 logits [vocab_size]."""
    logprobs = logits.log_softmax(0)
    if not top:
        return TokenLogprob(token, float(logprobs[token]))
    values, tokens = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))
