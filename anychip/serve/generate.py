"""`anychip generate`: continuations and answers for scripts, as text or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from anychip.errors import InputError
from anychip.files import atomic_writer
from anychip.progress import progress
from anychip.serve.streams import use_utf8
from anychip.serve.talker import Message, Talker, WeightType, open_talker

_EXAMPLE = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """Text to continue, or messages to answer. `id` names it in the output."""

    id: str
    text: str | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Completion:
    id: str
    sample: int
    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int


def generate(
    path: Path,
    *,
    prompt: str | None = None,
    file: Path | None = None,
    chat: bool = False,
    system: str = "",
    samples: int = 1,
    output: Path | None = None,
    format: Literal["text", "jsonl"] = "text",
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    weights: WeightType = "auto",
) -> None:
    """Continue prompts with the model in a run or an export, and write the results in the order of the prompts.

    `prompt` is one text; `file` is a .jsonl with a `prompt` or `messages` in every line, or a text file that is one
    prompt. `chat` makes each text the user's message of a conversation, after `system`. The same seed gives the same
    results whatever else is generated beside them. Without `output` they go to standard output.
    """
    prompts = _given_prompts(prompt, file)
    if samples < 1:
        raise InputError(f"samples is {samples}.", do="Ask for 1 or more.")
    if chat or system:
        prompts = [_as_conversation(one, system) for one in prompts]
    talker = open_talker(path, sampling or {}, weights)
    if samples > 1 and talker.sampling.temperature == 0:
        raise InputError(
            f"asks for {samples} samples, which are all alike at temperature 0.", where="generate", do="Raise it."
        )
    use_utf8(sys.stdout)
    with ExitStack() as stack:
        out: IO[str] = sys.stdout if output is None else stack.enter_context(atomic_writer(output, "w"))
        bar = stack.enter_context(progress("generate", total=len(prompts) * samples, unit="answers"))
        for number, completion in enumerate(complete(talker, prompts, samples=samples, seed=seed)):
            _write(completion, out, format, first=number == 0)
            bar.advance()


def complete(talker: Talker, prompts: Sequence[Prompt], *, samples: int = 1, seed: int = 0) -> Iterator[Completion]:
    """Every prompt `samples` times, in order. A continuation ends at the end of a document or of a turn."""
    from anychip.serve.engine import Request

    requests = [
        Request(f"{prompt.id}/{sample}", _encode(talker, prompt), talker.sampling, talker.stop_ids, seed)
        for prompt in prompts
        for sample in range(samples)
    ]
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    ended: dict[str, str] = {}
    written = 0
    for event in talker.engine.run(requests):
        if event.token is not None:
            tokens[event.request_id].append(event.token)
        if event.finish_reason is not None:
            ended[event.request_id] = event.finish_reason
        while written < len(requests) and requests[written].id in ended:
            request = requests[written]
            ids = tokens.pop(request.id)
            yield Completion(
                id=prompts[written // samples].id,
                sample=written % samples,
                text=talker.tokenizer.decode(ids),
                finish_reason=ended[request.id],
                prompt_tokens=len(request.prompt),
                tokens=len(ids),
            )
            written += 1


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a .jsonl file, or the one prompt that any other text file is.

    Raises InputError naming the file and line for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot be read ({error.strerror}).", where=path, do="Give a .jsonl or a text file."
        ) from None
    except UnicodeDecodeError:
        raise InputError("is not text in UTF-8.", where=path, do="Give a .jsonl or a text file.") from None
    if path.suffix != ".jsonl":
        return [Prompt(path.name, text)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError("holds no prompts.", where=path, do=f"Each line looks like {_EXAMPLE}")
    prompts = [_parse_prompt(line, number, f"{path}, line {number}") for number, line in lines]
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise InputError("gives two prompts the same id.", where=path, do="Ids must differ, or be left out.")
    return prompts


def _given_prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    if (prompt is None) == (file is None):
        raise InputError("needs either a prompt or a file of prompts.", where="generate", do="Give one of the two.")
    return [Prompt("prompt", prompt)] if file is None else read_prompts(file)


def _as_conversation(prompt: Prompt, system: str) -> Prompt:
    """A text becomes the user's message; messages stay, after `system` where they have none of their own."""
    messages = prompt.messages or ({"role": "user", "content": prompt.text or ""},)
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return Prompt(prompt.id, messages=messages)


def _encode(talker: Talker, prompt: Prompt) -> list[int]:
    if prompt.text is None:
        return talker.encode_messages(prompt.messages)
    return talker.tokenizer.encode(prompt.text)


def _write(completion: Completion, out: IO[str], format: Literal["text", "jsonl"], first: bool) -> None:
    if format == "jsonl":
        out.write(json.dumps(vars(completion), ensure_ascii=False) + "\n")
    else:
        out.write(f"{'' if first else chr(10)}{completion.text}\n")  # an empty line between answers
    out.flush()


def _parse_prompt(line: str, number: int, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("is not valid JSON.", where=where, do=f"Each line looks like {_EXAMPLE}") from None
    record = record if isinstance(record, dict) else {}
    name, text, messages = str(record.get("id", number)), record.get("prompt"), record.get("messages")
    if isinstance(text, str) and messages is None:
        return Prompt(name, text)
    if not isinstance(messages, list) or not messages or text is not None:
        raise InputError("has neither a `prompt` nor `messages`.", where=where, do=f"Each line looks like {_EXAMPLE}")
    for message in messages:
        fits = isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
        if not fits:
            raise InputError(
                f"has a message that is not a role ({', '.join(_ROLES)}) with a text as content.",
                where=where,
                do=f"Each line looks like {_EXAMPLE}",
            )
    return Prompt(name, messages=tuple(messages))
