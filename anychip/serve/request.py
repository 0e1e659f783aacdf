"""What is asked of the engine, and what it says while it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from anychip.recipe.schema import SamplingConfig

FinishReason = Literal["stop", "length", "context", "error"]


class Constraint(Protocol):
    """What an answer must look like, token by token: a grammar, for instance. One answer's own."""

    def mask(self, logits: Tensor) -> Tensor:
        """fp32 [vocab_size] with -inf where a token may not come next."""

    def accept(self, token: int) -> bool:
        """Take note of a chosen token; whether the answer may go on."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `stop_ids` end the answer and are not part of it."""

    id: str
    prompt: Sequence[int]
    sampling: SamplingConfig
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    draws: str = ""
    """Names its random numbers, with the seed; by default its id does."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Taken from the logit of each token of the answer so far: once, and as often as it occurs."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    """With log-probabilities of its tokens and of this many of the likeliest at each place; None: without."""
    prompt_logprobs: bool = False
    """With those of the prompt's tokens too, but the first."""


@dataclass(frozen=True)
class TokenLogprob:
    """ln of the model's own probability of a token, before penalties and temperature, and of the likeliest ones."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Event:
    """One token of a request, or its end: `stop` (a stop token), `length` (max_new_tokens), `context` (no room) or
    `error` (the model's numbers are damaged)."""

    request_id: str
    token: int | None = None
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    """In the first event of a request that asked for them."""
