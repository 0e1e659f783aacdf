"""What tuning really reads: the rows of a step as text, with what carries loss told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from anychip.data.batch import IGNORE_LABEL
from anychip.data.tokenizer import Tokenizer
from anychip.errors import InputError
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.tune.dialogs import Dialog
from anychip.tune.dpo import DpoData
from anychip.tune.encoding import EncodedDialog
from anychip.tune.sft import SftData

if TYPE_CHECKING:
    from rich.console import Console

_OPEN, _CLOSE = "{+", "+}"  # as `git diff --word-diff` marks what is added
Row = tuple[str, Sequence[tuple[str, EncodedDialog]]]


def show_sample(recipe: Recipe, run: RunDirectory, stage: str, step: int, sample: int | None, console: Console) -> None:
    """Print one row of a step of `sft` or `dpo`, or all of them: source, template, tokens, and the text with what is
    learned in colour, or between {+ and +} where there are no colours. Raises InputError for a row that is none."""
    rows, tokenizer = (_sft_rows if stage == "sft" else _dpo_rows)(recipe, run, step)
    if sample is not None and not 0 <= sample < len(rows):
        raise InputError(f"there is no sample {sample} in a step of {len(rows)}.", do="Samples are counted from 0.")
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    chosen = range(len(rows)) if sample is None else [sample]
    for number in chosen:
        title, parts = rows[number]
        total = sum(len(part) + 1 for _, part in parts)
        learned = sum(int((part.labels != IGNORE_LABEL).sum()) for _, part in parts)
        head = f"step {step}, sample {number} of {len(rows)}{title}: {total:,} tokens, {learned:,} learned"
        say(f"{head}; template {recipe.tune.template}", style="bold")
        for name, part in parts:
            say(f"-- {name}", style="cyan")
            _print(pieces(part, tokenizer), console)


def pieces(sample: EncodedDialog, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The text of a sample in runs of tokens that are learned, or are not; control tokens by name."""
    tokens = [*sample.input_ids.tolist(), int(sample.labels[-1])]
    learned = [False, *(sample.labels != IGNORE_LABEL).tolist()]
    if tokens[-1] == IGNORE_LABEL:
        tokens, learned = tokens[:-1], learned[:-1]
    for flag, run in groupby(zip(tokens, learned, strict=True), key=lambda pair: pair[1]):
        yield tokenizer.decode([token for token, _ in run], skip_special=False), flag


def _print(runs: Iterator[tuple[str, bool]], console: Console) -> None:
    from rich.text import Text

    coloured = console.is_terminal and not console.no_color
    text = Text()
    for piece, learned in runs:
        shown = "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in piece)
        marked = shown if coloured or not learned else f"{_OPEN}{shown}{_CLOSE}"
        text.append(marked, style="bold green" if learned else "dim")
    console.print(text, soft_wrap=True)


def _sft_rows(recipe: Recipe, run: RunDirectory, step: int) -> tuple[list[Row], Tokenizer]:
    data = SftData(recipe, run)
    paths = [source.path for source in data.config.sources]
    rows: list[Row] = []
    for samples in data.samples(step):
        parts = [(_about(data.dialog(sample), paths), sample) for sample in samples]
        rows.append((f", {len(parts)} dialogs" if len(parts) > 1 else "", parts))
    return rows, data.tokenizer


def _dpo_rows(recipe: Recipe, run: RunDirectory, step: int) -> tuple[list[Row], Tokenizer]:
    data = DpoData(recipe, run)
    paths = [source.path for source in data.config.sources]
    rows: list[Row] = []
    for number in data.numbers(step):
        chosen, rejected = data.encoded[number]
        about = _about(data.pairs[number].chosen, paths)
        rows.append((", a pair", [(f"{about}, chosen", chosen), (f"{about}, rejected", rejected)]))
    return rows, data.tokenizer


def _about(dialog: Dialog, paths: Sequence[str]) -> str:
    tools = f", {len(dialog.tools)} tools" if dialog.tools else ""
    return f"{paths[dialog.source]}{tools}"
