"""Every conversion ends here: do the converted weights give the logits that the original weights give?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from anychip.errors import UnfitError
from anychip.interchange.reference import Read, reference_logits
from anychip.model.decoder import DecoderLayer
from anychip.model.layers import RMSNorm
from anychip.model.rope import cos_sin, rope_scale
from anychip.progress import progress
from anychip.recipe.schema import ModelConfig

TOKENS = 64
LARGEST_RELATIVE_DIFFERENCE = 1e-4
_SEED = 20_240_424


@dataclass(frozen=True)
class LogitCheck:
    """Both sides in fp32 on the same rounded weights; `relative` is the largest difference over the largest logit."""

    tokens: int
    largest_difference: float
    largest_logit: float
    relative: float
    same_top_1: float
    threshold: float = LARGEST_RELATIVE_DIFFERENCE

    def as_record(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "against": "independent forward pass on the published tensors"}

    @property
    def passed(self) -> bool:
        return self.relative <= self.threshold  # false for NaN


def check_logits(config: ModelConfig, read_logical: Read, read_published: Read, where: object) -> LogitCheck:
    """Compare the decoder on logical tensors with the reference on published ones, one layer in memory at a time.

    Both `read_*` return tensors that were already rounded to the conversion's dtype. Raises UnfitError when the
    difference is above the threshold.
    """
    length = min(TOKENS, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(0, config.vocab_size, (length,), generator=generator)
    with torch.no_grad(), progress("logit check", 2, "passes") as bar:
        ours = _decoder_logits(config, read_logical, tokens)
        bar.advance()
        theirs = reference_logits(config, read_published, tokens)
        bar.advance()
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    check = LogitCheck(
        tokens=length,
        largest_difference=difference,
        largest_logit=largest,
        relative=difference / largest if largest else difference,
        same_top_1=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    )
    if not check.passed:
        raise UnfitError(
            f"the converted weights give other logits: they differ by {difference:.3g}, logits reach {largest:.3g}.",
            where=where,
            do="The conversion is not published. Check that the weights are finite and complete.",
        )
    return check


def _decoder_logits(config: ModelConfig, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    """The decoder's own layers, filled one at a time."""
    rope = rope_scale(config, len(tokens))
    cos, sin = cos_sin(config, torch.arange(len(tokens)), rope.alpha)
    scale = rope.mscale**2 / config.head_dim**0.5
    x = read("embed_tokens.weight")[tokens].float()[None]
    layer = DecoderLayer(config, 0)
    for number in range(config.num_hidden_layers):
        prefix = f"layers.{number}."
        for name, parameter in layer.named_parameters():
            parameter.copy_(read(prefix + name))
        x = layer(x, cos, sin, scale)
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.copy_(read("norm.weight"))
    return norm(x)[0] @ read("lm_head.weight").float().t()
