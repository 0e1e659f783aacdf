"""How much one request, one key and the whole server may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    body_bytes: int = 1 << 20
    json_depth: int = 64
    header_seconds: float = 10.0
    """A connection that has not sent a whole request header by then is closed."""
    body_seconds: float = 20.0
    write_seconds: float = 30.0
    """A reader that takes nothing for so long is dropped, and its answer with it."""
    connections: int = 1000
    queue: int = 64
    """Answers that may wait while the engine is full."""
    per_key: int = 64
    """Answers that one key, or one address where there are no keys, may have at a time."""
    characters_per_token: int = 16
    """A prompt of more characters than this times the context is refused before it is tokenized."""
    grammar_seconds: float = 5.0


# What the schema of a request says, too.
MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 100
MAX_BIASES = 300
MAX_MESSAGES = 1000
MAX_TOOLS = 64
MAX_SCHEMA_BYTES = 64 << 10
MAX_PROMPTS = 32
