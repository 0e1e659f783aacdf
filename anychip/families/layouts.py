"""Which layout a family's weights are published in, and which one a config.json is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from anychip.families import deepseek_v3, llama, telechat2
from anychip.families.published import PublishedTensor
from anychip.recipe.schema import ModelConfig

Layout = Literal["family", "llama"]  # the family's own, or plain Llama's (and Mixtral's)
IGNORED_SUFFIXES = telechat2.IGNORED_SUFFIXES


def published_tensors(config: ModelConfig, layout: Layout = "family") -> Iterator[PublishedTensor]:
    """Every published tensor of this model, in the order of the forward pass; shapes are [out, in]."""
    if layout == "llama":
        return llama.published_tensors(config, plain=True)
    if config.family == "telechat3-moe":
        return deepseek_v3.published_tensors(config)
    if config.family in llama.ARCHITECTURES:
        return llama.published_tensors(config, plain=config.family == "llama")
    return telechat2.published_tensors(config)


def config_to_json(
    config: ModelConfig, dtype: str, bos: int | None, eos: int, pad: int | None, layout: Layout = "family"
) -> dict[str, Any]:
    """The config.json of a model; `dtype` is torch's name, such as bfloat16. Raises InputError for a model that the
    layout cannot say."""
    if layout == "family" and config.family.startswith("telechat2"):
        return telechat2.config_to_json(config, dtype, bos, eos, pad)
    if layout == "family" and config.family == "telechat3-moe":
        fields = deepseek_v3.config_to_json(config)
    else:
        plain = layout == "llama" or config.family == "llama"
        if plain:
            llama.check_plain(config, dtype)
        fields = llama.config_to_json(config, plain=plain)
    return {
        **fields,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": dtype,
    }


def config_from_json(raw: Mapping[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """A ModelConfig from a published config.json, and warnings about values that are probably wrong in it.

    Raises InputError for an architecture that is not known and for settings that this decoder does not compute.
    """
    kind = raw.get("model_type")
    names = raw.get("architectures")
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if kind == deepseek_v3.MODEL_TYPE or first == deepseek_v3.ARCHITECTURE:
        return deepseek_v3.config_from_json(raw, where), []
    for family, (architecture, model_type) in llama.ARCHITECTURES.items():
        same = first.lower() == architecture.lower()  # TeleChat3's are spelled in two ways
        if same or (not first and isinstance(kind, str) and kind.lower() == model_type):
            return llama.config_from_json(raw, family, where), []
    return telechat2.config_from_json(raw, where)
