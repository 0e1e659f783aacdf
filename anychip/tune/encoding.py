"""From dialogs to token ids and the labels that carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anychip.data.batch import IGNORE_LABEL
from anychip.data.tokenizer import Tokenizer
from anychip.families.telechat2 import prompt_parts
from anychip.progress import progress
from anychip.tune.dialogs import Dialog

Ids = npt.NDArray[np.int32]
Part = str | int
_DIALOGS_AT_ONCE = 4096


@dataclass(frozen=True)
class EncodedDialog:
    """`labels` [length] is `input_ids` [length] shifted by one, -100 where a position carries no loss."""

    input_ids: Ids
    labels: Ids

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_dialogs(dialogs: Sequence[Dialog], tokenizer: Tokenizer) -> list[EncodedDialog]:
    """Each dialog in the family's chat template; loss on every token of every answer and on the `<_end>` after it.

    System text, questions and the template's own tokens carry none. Text never becomes a control id.
    """
    encoded: list[EncodedDialog] = []
    with progress("encoding dialogs", total=len(dialogs), unit="dialogs") as bar:
        for start in range(0, len(dialogs), _DIALOGS_AT_ONCE):
            some = [_parts(dialog, tokenizer) for dialog in dialogs[start : start + _DIALOGS_AT_ONCE]]
            texts = list(dict.fromkeys(part for parts in some for part, _ in parts if isinstance(part, str)))
            ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
            encoded += [_assemble(parts, ids) for parts in some]
            bar.advance(len(some))
    return encoded


def _parts(dialog: Dialog, tokenizer: Tokenizer) -> list[tuple[Part, bool]]:
    """Text and control ids in order, each with whether it is learned. Every text is encoded by itself."""
    turns = [{"role": message.role, "content": message.content} for message in dialog.messages]
    parts: list[tuple[Part, bool]] = []
    for end, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = prompt_parts(turns[:end], tokenizer.special_tokens)
        if prompt[: len(parts)] != [part for part, _ in parts]:
            raise ValueError("the chat template rewrites earlier turns, so their answers cannot be learned")
        parts += [(part, False) for part in prompt[len(parts) :]]
        parts += [(turn["content"], True), (tokenizer.eos_id, True)]
    return parts


def _assemble(parts: list[tuple[Part, bool]], ids: dict[str, list[int]]) -> EncodedDialog:
    tokens: list[int] = []
    labels: list[int] = []
    for part, learned in parts:
        some = [part] if isinstance(part, int) else ids[part]
        tokens += some
        labels += some if learned else [IGNORE_LABEL] * len(some)
    return EncodedDialog(np.array(tokens[:-1], dtype=np.int32), np.array(labels[1:], dtype=np.int32))
