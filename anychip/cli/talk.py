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
from anychip.errors import InputError

WEIGHTS = ("auto", "bf16", "fp32", "int8")
ENGINES = ("anychip", "vllm")
OURS_ALONE = ("allow_host", "queue", "prefill_tokens", "batch_invariant", "drain_seconds")


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


def serve(
    context: typer.Context,
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    api_keys: Annotated[Path | None, typer.Option(help="File of API keys, one a line.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A host name to answer to.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A site whose scripts may call: https://...")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the API.")] = None,
    engine: Annotated[str, typer.Option(help="anychip, or vllm to hand an export to vLLM.")] = "anychip",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    repetition_penalty: PenaltyOption = None,
    max_new_tokens: LengthOption = None,
    weights: WeightsOption = "auto",
    max_batch: Annotated[int | None, typer.Option(min=1, max=1024, help="Answers at a time; default: 32.")] = None,
    queue: Annotated[int | None, typer.Option(min=0, help="Answers that may wait; more get status 429.")] = None,
    context_length: Annotated[int | None, typer.Option(min=2, help="Default: the model's.")] = None,
    prefill_tokens: Annotated[int, typer.Option(min=16, help="Prompt tokens a step.")] = 512,
    batch_invariant: Annotated[bool, typer.Option(help="Equal bits whatever else is served; slower.")] = False,
    thinking: Annotated[bool, typer.Option(help="Answers begin with reasoning (T1, TeleChat3).")] = False,
    drain_seconds: Annotated[int, typer.Option(min=0, help="Time for running answers after SIGTERM.")] = 30,
) -> None:
    """Serve a model: an OpenAI-compatible API, and a page to talk on.

    Words behind -- go to vLLM's own command line, with --engine vllm.
    """
    sampling = _given(temperature, top_k, top_p, repetition_penalty, max_new_tokens)
    if one_of(engine, "engine", ENGINES) == "vllm":
        from anychip.serve.vllm import serve_by_vllm

        _refuse_ours_alone(context)
        serve_by_vllm(
            model,
            name=name,
            host=host,
            port=port,
            api_keys=api_keys,
            origins=allow_origin or (),
            sampling=sampling,
            weights=one_of(weights, "weights", WEIGHTS),
            max_batch=max_batch,
            context_length=context_length,
            thinking=thinking,
            more=context.args,
        )
        return
    if context.args:
        raise InputError(f"does not know {' '.join(context.args)}.", where="serve", do="Leave it out.")
    from anychip.serve.serve import serve

    serve(
        model,
        name=name,
        host=host,
        port=port,
        api_keys=api_keys,
        hosts=allow_host or (),
        origins=allow_origin or (),
        sampling=sampling,
        weights=one_of(weights, "weights", WEIGHTS),
        max_batch=32 if max_batch is None else max_batch,
        queue=queue,
        context_length=context_length,
        prefill_tokens=prefill_tokens,
        batch_invariant=batch_invariant,
        thinking=thinking,
        drain_seconds=drain_seconds,
    )


def _refuse_ours_alone(context: typer.Context) -> None:
    for name in OURS_ALONE:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"--{name.replace('_', '-')} is for anychip's own engine.",
                where="--engine vllm",
                do="Leave it out; words behind -- go to vLLM as they are.",
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
