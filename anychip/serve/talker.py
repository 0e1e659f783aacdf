"""A loaded model with what talking to it needs: engine, tokenizer, template, stop tokens, sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ValidationError

from anychip.errors import InputError
from anychip.families.templates import Template, prompt_parts
from anychip.recipe.schema import SamplingConfig

if TYPE_CHECKING:
    from anychip.data.tokenizer import Tokenizer
    from anychip.model.decoder import Decoder
    from anychip.serve.engine import Engine

Message = Mapping[str, str]  # role (system, user or assistant) and content
WeightType = Literal["auto", "bf16", "fp32", "int8"]

# A model tuned with loss on the turn that follows an answer may open the user's turn itself.
_STOP_TOKENS = ("<_user>", "<_system>")


class LoadedModel(Protocol):
    """What reading a run or an export gives."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def sampling(self) -> SamplingConfig: ...


@dataclass(frozen=True)
class Talker:
    engine: Engine
    tokenizer: Tokenizer
    sampling: SamplingConfig
    template: Template = "B"

    @property
    def stop_ids(self) -> frozenset[int]:
        special = self.tokenizer.special_tokens
        return frozenset((self.tokenizer.eos_id, *(special[name] for name in _STOP_TOKENS if name in special)))

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the model's next answer begins. Text never becomes a control id."""
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        return self.tokenizer.encode_parts(prompt_parts(turns, self.tokenizer.special_tokens, self.template))


def open_talker(path: Path, sampling: Mapping[str, Any], weights: WeightType = "auto", **engine: Any) -> Talker:
    """Load a run or an export; `sampling` holds the fields that replace the model's own defaults."""
    from anychip.interchange.load import load_for_inference

    loaded = load_for_inference(path)
    return make_talker(loaded, sampling, weights, loaded.template, **engine)


def make_talker(
    model: LoadedModel,
    sampling: Mapping[str, Any],
    weights: WeightType = "auto",
    template: Template = "B",
    *,
    max_batch: int = 8,
    context_length: int | None = None,
    prefill_tokens: int = 512,
    invariant: bool = False,
) -> Talker:
    """Prepare a loaded model for talking. Its decoder is used up: the weights move into the engine."""
    import torch

    from anychip.serve.engine import Engine
    from anychip.serve.inference import InferenceModel

    stored = model.decoder.head_weight.dtype
    chosen = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(weights, stored)
    if chosen not in (torch.bfloat16, torch.float32):
        chosen = torch.float32  # fp16 weights lose bits in bf16
    inference = InferenceModel(model.decoder, chosen, release=True, int8=weights == "int8", invariant=invariant)
    longest = inference.config.max_position_embeddings
    if context_length is not None and context_length > longest:
        raise InputError(
            f"a context of {context_length:,} tokens is asked for; the model was made for {longest:,}.",
            where="serve",
            do="Ask for at most that.",
        )
    engine = Engine(inference, max_batch=max_batch, context_length=context_length, prefill_tokens=prefill_tokens)
    return Talker(engine, model.tokenizer, replace_sampling(model.sampling, sampling), template)


def replace_sampling(defaults: SamplingConfig, given: Mapping[str, Any]) -> SamplingConfig:
    """`defaults` with the fields of `given`; InputError names a field that is out of range."""
    try:
        return SamplingConfig.model_validate({**defaults.model_dump(), **given})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(
            f"{'.'.join(map(str, problem['loc']))} is {problem['input']!r}: {problem['msg'].lower()}.",
            where="sampling",
            do=f"Known fields: {', '.join(SamplingConfig.model_fields)}.",
        ) from None
