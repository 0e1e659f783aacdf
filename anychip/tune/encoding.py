"""From a dialog to token ids and the labels that carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anychip.data.batch import IGNORE_LABEL
from anychip.data.tokenizer import Tokenizer
from anychip.families.telechat2 import prompt_parts
from anychip.tune.dialogs import Dialog, Message

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class EncodedDialog:
    """`labels` [length] is `input_ids` [length] shifted by one, -100 where a position carries no loss."""

    input_ids: Ids
    labels: Ids

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_dialog(dialog: Dialog, tokenizer: Tokenizer) -> EncodedDialog:
    """The dialog in the family's chat template; loss on every token of every answer and on the `<_end>` after it.

    System text, questions and the template's own tokens carry none. Text never becomes a control id.
    """
    ids: list[int] = []
    learned: list[bool] = []
    for end, message in enumerate(dialog.messages):
        if message.role != "assistant":
            continue
        prompt = encode_prompt(dialog.messages[:end], tokenizer)
        if prompt[: len(ids)] != ids:
            raise ValueError("the chat template changes earlier turns, so their answers cannot be learned")
        answer = [*tokenizer.encode(message.content), tokenizer.eos_id]
        learned += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
        ids = prompt + answer
    tokens = np.array(ids, dtype=np.int32)
    return EncodedDialog(tokens[:-1], np.where(learned, tokens, IGNORE_LABEL)[1:].astype(np.int32))


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation up to where the model's next answer begins."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.encode_parts(prompt_parts(turns, tokenizer.special_tokens))
