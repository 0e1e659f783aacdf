"""Talking to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anychip.cli.options import (
    LengthOption,
    ModelArgument,
    PenaltyOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    WeightsOption,
    one_of,
)

WEIGHTS = ("auto", "bf16", "fp32")


def chat(
    model: ModelArgument,
    system: SystemOption = "",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    max_new_tokens: LengthOption = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    weights: WeightsOption = "auto",
) -> None:
    """Talk to a model in the terminal; from a pipe, each line is a question."""
    from anychip.serve.chat import chat

    sampling = _given(temperature, top_k, top_p, repetition_penalty, max_new_tokens)
    chat(model, system=system, sampling=sampling, seed=seed, weights=one_of(weights, "weights", WEIGHTS))


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="A .jsonl of prompts or messages, or a text file.")] = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="The prompt is a question to answer.")] = False,
    system: SystemOption = "",
    samples: Annotated[int, typer.Option(help="Results a prompt.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    format: Annotated[str, typer.Option(help="text or jsonl.")] = "text",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    max_new_tokens: LengthOption = None,
    seed: Annotated[int, typer.Option(help="Same seed, same results.")] = 0,
    weights: WeightsOption = "auto",
) -> None:
    """Continue prompts, or answer questions, for scripts."""
    from anychip.serve.generate import generate

    generate(
        model,
        prompt=prompt,
        file=file,
        chat=as_chat,
        system=system,
        samples=samples,
        output=output,
        format=one_of(format, "format", ("text", "jsonl")),
        sampling=_given(temperature, top_k, top_p, repetition_penalty, max_new_tokens),
        seed=seed,
        weights=one_of(weights, "weights", WEIGHTS),
    )


def _given(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """The sampling fields that were given on the command line."""
    values = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
    }
    return {name: value for name, value in values.items() if value is not None}
