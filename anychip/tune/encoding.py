"""From dialogs to token ids and the labels that carry loss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from anychip.data.batch import IGNORE_LABEL
from anychip.data.tokenizer import Tokenizer
from anychip.errors import InputError
from anychip.families.templates import Part, Template, render
from anychip.progress import progress
from anychip.recipe.schema import LossOn
from anychip.tune.dialogs import Dialog

Ids = npt.NDArray[np.int32]
_DIALOGS_AT_ONCE = 4096
# answer: what the model is to say. telechat-torch: as published, every <_user> too, and all from <_bot> to <_end>.
_LEARNED: dict[LossOn, frozenset[str]] = {
    "answer": frozenset(("answer", "end")),
    "telechat-torch": frozenset(("user", "bot", "prefix", "answer", "end")),
    "all": frozenset(("start", "system", "user", "question", "bot", "prefix", "answer", "end", "after")),
}
_OF_AN_ANSWER = ("bot", "prefix", "answer", "end")


@dataclass(frozen=True)
class Encoding:
    """How dialogs become tokens. `parity`: as the published templates do it, oddities included. `last_answer`: of all
    answers, only the last is learned."""

    template: Template = "B"
    loss_on: LossOn = "answer"
    parity: bool = False
    last_answer: bool = False


@dataclass(frozen=True)
class EncodedDialog:
    """`labels` [length] is `input_ids` [length] shifted by one, -100 where a position carries no loss. `dialog` is the
    number of the dialog that this is (a part of)."""

    input_ids: Ids
    labels: Ids
    dialog: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


class LearnedPart(NamedTuple):
    part: Part
    learned: bool


def encode_dialogs(
    dialogs: Sequence[Dialog], tokenizer: Tokenizer, encoding: Encoding = Encoding()
) -> list[EncodedDialog]:
    """Each dialog in the chat template, and which of its tokens are learned. Text never becomes a control id.

    Every answer is learned once, behind the very prompt that would ask for it. Where a template drops thoughts from
    later prompts, a dialog makes several samples.
    """
    encoded: list[EncodedDialog] = []
    with progress("encoding dialogs", total=len(dialogs), unit="dialogs") as bar:
        for start in range(0, len(dialogs), _DIALOGS_AT_ONCE):
            some = dialogs[start : start + _DIALOGS_AT_ONCE]
            samples = [
                (number, sample)
                for number, dialog in enumerate(some, start)
                for sample in _samples(dialog, tokenizer, encoding)
            ]
            values = (part.value for _, sample in samples for part, _ in sample)
            texts = list(dict.fromkeys(value for value in values if isinstance(value, str)))
            ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
            encoded += [_assemble(sample, ids, number) for number, sample in samples]
            bar.advance(len(some))
    return encoded


def _samples(dialog: Dialog, tokenizer: Tokenizer, encoding: Encoding) -> list[list[LearnedPart]]:
    """The samples of a dialog; InputError says which dialog the template has no place for."""
    try:
        return list(learned_parts(dialog, tokenizer, encoding))
    except InputError as error:
        question = " ".join(dialog.question.split())
        shown = question if len(question) <= 60 else f"{question[:57]}..."
        raise InputError(error.what, where=f'the dialog "{shown}"', do=error.do) from None


def learned_parts(dialog: Dialog, tokenizer: Tokenizer, encoding: Encoding) -> Iterator[list[LearnedPart]]:
    """The samples that a dialog makes, each as parts with whether they are learned; the whole dialog comes last.

    The answers not learned yet, from the last one down: what was rendered up to one also serves for those before it
    whose prompts it begins with.
    """

    def parts_of(messages: int) -> list[Part]:
        return render(
            dialog.messages[:messages],
            tokenizer.special_tokens,
            encoding.template,
            dialog.tools,
            prompt=False,
            parity=encoding.parity,
        )

    kinds = _LEARNED[encoding.loss_on]
    turns = [turn for turn, message in enumerate(dialog.messages) if message.role == "assistant"]
    turns = turns[-1:] if encoding.last_answer else turns
    as_asked = {turn: parts_of(turn + 1) for turn in turns}
    samples: list[list[LearnedPart]] = []
    left = set(turns)
    while left:
        sample = as_asked[max(left)]
        served = left if encoding.parity else {turn for turn in left if _begins_with(sample, as_asked[turn])}
        first = not samples
        samples.append([LearnedPart(p, p.kind in kinds and _is_learned(p, served, first)) for p in sample])
        left = left - served
    yield from reversed(samples)


def _begins_with(parts: list[Part], beginning: list[Part]) -> bool:
    return parts[: len(beginning)] == beginning


def _is_learned(part: Part, served: Collection[int], whole: bool) -> bool:
    """An answer once; what belongs to no answer with the whole dialog alone."""
    return part.turn in served if part.kind in _OF_AN_ANSWER else whole


def _assemble(parts: list[LearnedPart], ids: dict[str, list[int]], dialog: int) -> EncodedDialog:
    tokens: list[int] = []
    labels: list[int] = []
    for (value, _, _), learned in parts:
        some = [value] if isinstance(value, int) else ids[value]
        tokens += some
        labels += some if learned else [IGNORE_LABEL] * len(some)
    return EncodedDialog(np.array(tokens[:-1], dtype=np.int32), np.array(labels[1:], dtype=np.int32), dialog)
