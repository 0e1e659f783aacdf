"""The sizes at which a recipe's operators are probed: its own where they take milliseconds, else cut down.

What a kernel chooses by stays: head_dim, the number of queries a key head serves, whether there are biases. What only
makes it longer is cut: tokens, heads, and beyond a few thousand the width. Sums stay thousands of terms long, so that
a narrow accumulator shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from anychip.recipe import Recipe

_TOKENS, _HEADS, _HIDDEN, _INTERMEDIATE, _VOCABULARY = 192, 4, 2048, 4096, 4096


@dataclass(frozen=True)
class Shapes:
    """Sizes of one probe; `rows` sequences of `tokens`."""

    rows: int
    tokens: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    eps: float

    def describe(self) -> str:
        return (
            f"{self.rows} x {self.tokens} tokens, hidden {self.hidden}, intermediate {self.intermediate}, "
            f"{self.heads} query and {self.key_heads} key heads of {self.head_dim}, vocabulary {self.vocabulary}"
        )


def shapes_of(recipe: Recipe) -> Shapes:
    """What a recipe's shapes become."""
    model = recipe.final_model
    served = model.num_attention_heads // model.num_key_value_heads
    key_heads = max(1, min(model.num_key_value_heads, _HEADS // served))
    return Shapes(
        rows=2,
        tokens=_TOKENS,  # not a multiple of 128: ends of blocks are probed too
        hidden=min(model.hidden_size, _HIDDEN),
        intermediate=min(model.intermediate_size, _INTERMEDIATE),
        heads=key_heads * served,
        key_heads=key_heads,
        head_dim=model.head_dim,
        vocabulary=min(model.vocab_size, _VOCABULARY),
        eps=model.rms_norm_eps,
    )
