"""Answers in the making: which tokens the model has read, which one comes next, when they end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anychip.model.cache import KeyValueCache
from anychip.serve.inference import Piece
from anychip.serve.request import Event, FinishReason, Request, TokenLogprob
from anychip.serve.sampling import draw_token, penalize_occurrence, penalize_repetition, uniform_draw


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

    def advance(self, tokens: int, logits: Tensor) -> bool:
        """The model has read `tokens` more; fp32 logits [rows, vocab_size] as the piece asked for.

        Whether the next token can be chosen: the last row is for it then. While the prompt is being read it cannot.
        """
        taken, self.pending = self.pending[:tokens], self.pending[tokens:]
        self.read += taken
        if self.in_prompt and self.request.prompt_logprobs:
            following = self.request.prompt[len(self.read) - tokens + 1 : len(self.read) + 1]
            for token, logprobs in zip(following, logits.log_softmax(-1), strict=False):
                self.prompt_logprobs.append(token_logprob(logprobs, token, self.request.top_logprobs or 0))
        return not self.pending

    @property
    def adjusts(self) -> bool:
        """Whether the next token is chosen from other logits than the model's."""
        request = self.request
        penalized = request.presence_penalty or request.frequency_penalty or request.sampling.repetition_penalty != 1
        return bool(penalized or request.logit_bias or request.constraint is not None)

    def adjusted(self, logits: Tensor) -> Tensor:
        """The logits [vocab_size] to choose from."""
        request = self.request
        logits = penalize_occurrence(logits, self.answered, request.presence_penalty, request.frequency_penalty)
        if request.logit_bias:
            tokens = torch.tensor(list(request.logit_bias), device=logits.device)
            logits = logits.index_add(0, tokens, logits.new_tensor(list(request.logit_bias.values())))
        if request.constraint is not None:
            logits = request.constraint.mask(logits)
        return penalize_repetition(logits, self.seen, request.sampling.repetition_penalty)

    def draw(self, logits: Tensor) -> int:
        """The next token, of a request that is not greedy."""
        request = self.request
        number = uniform_draw(request.seed, request.draws or request.id, self.length)
        return draw_token(logits, request.sampling, number)

    def take(self, token: int, logprobs: Tensor | None) -> Event:
        """Go on with this token. `logprobs` [vocab_size] where the request asks for them, by the model's own logits.

        The last event of an answer may carry its last token: with `length` and `context` it does.
        """
        request, index = self.request, self.length
        prompt_logprobs = self.prompt_logprobs if request.prompt_logprobs and not index else None
        if token in request.stop_ids:
            return Event(request.id, None, "stop", prompt_logprobs=prompt_logprobs)
        logprob = None if logprobs is None else token_logprob(logprobs, token, request.top_logprobs or 0)
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


def choose_next(answers: Sequence[Answer], logits: Tensor) -> list[Event]:
    """The next token of each answer, from fp32 logits [answers, vocab_size]: what can be done for all at once is."""
    least, most = logits.aminmax(dim=-1)  # NaN where a row has one
    sound = (least.isfinite() & most.isfinite()).tolist()
    asking = [row for row, one in enumerate(answers) if one.request.top_logprobs is not None]
    logprobs = dict(zip(asking, logits[asking].log_softmax(-1), strict=True))
    changed = [row for row, one in enumerate(answers) if one.adjusts and sound[row]]
    if changed:
        logits = logits.clone()
        for row in changed:
            logits[row] = answers[row].adjusted(logits[row])
    best = logits.argmax(-1).tolist()
    events = []
    for row, one in enumerate(answers):
        if not sound[row]:
            events.append(Event(one.request.id, None, "error"))
            continue
        token = best[row] if one.request.sampling.is_greedy else one.draw(logits[row])
        events.append(one.take(token, logprobs.get(row)))
    return events


def token_logprob(logprobs: Tensor, token: int, top: int) -> TokenLogprob:
    """From log-probabilities [vocab_size]."""
    if not top:
        return TokenLogprob(token, float(logprobs[token]))
    values, tokens = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))
