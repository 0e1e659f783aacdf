"""Requests, with their limits. What is not named here is refused: no templates, no URLs, no settings of the engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from anychip.serve.api import limits

# What is nearly of the right type is refused as the document says: "1" and true are no numbers, 0 is not false.
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=limits.MAX_STOP_CHARACTERS)]
Bias = Annotated[float, Field(strict=True, ge=-100, le=100)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: Name
    arguments: str


class ToolCall(Body):
    id: Annotated[str, StringConstraints(max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn. `tool` messages carry what a function returned."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    # The field of OpenAI's API is called schema, which pydantic keeps for itself.
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Body):
    include_usage: Flag = False
    include_obfuscation: Flag | None = None


class Generation(Body):
    """What both kinds of requests have in common. Fields left out take the model's own defaults."""

    model: Annotated[str, StringConstraints(max_length=200)] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(strict=True, gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(strict=True, ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(strict=True, ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=limits.MAX_BIASES)] | None = None
    max_tokens: Annotated[int, Field(strict=True, ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=limits.MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.MAX_STOPS)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1, lt=2**31)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=limits.MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag | None = None
    response_format: ResponseFormat | None = None
    # Taken note of and without effect, so that clients of OpenAI's API work unchanged.
    metadata: dict[str, str] | None = None
    store: Flag | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Generation):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=limits.MAX_LOGPROBS)] | None = None
    echo: Flag | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    suffix: None = None
