"""Sample answers: what a tuned model says to a few questions, beside what the documentation says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from anychip.families.templates import Template, prompt_parts
from anychip.files import write_json
from anychip.progress import progress
from anychip.rundir import RunDirectory

if TYPE_CHECKING:
    from anychip.data.tokenizer import Tokenizer
    from anychip.model.decoder import Decoder


class TalkingModel(Protocol):
    """What loading a run or an export gives."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def tokenizer(self) -> Tokenizer: ...


class AskedQuestion(Protocol):
    """A question, the documentation's answer ("" where it is not known), and what tuning had seen of it."""

    @property
    def question(self) -> str: ...

    @property
    def reference(self) -> str: ...

    @property
    def novelty(self) -> str: ...


@dataclass(frozen=True)
class SampleAnswer:
    question: str
    answer: str
    reference: str
    novelty: str


def sample_answers(
    model: TalkingModel,
    questions: Sequence[AskedQuestion],
    run: RunDirectory | None = None,
    *,
    system_prompt: str = "",
    template: Template = "B",
    max_new_tokens: int = 96,
) -> list[SampleAnswer]:
    """Answer each question with the likeliest token each time; with a run, also write its `samples.json`."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    tokenizer, samples = model.tokenizer, []
    with progress("sample answers", total=len(questions), unit="answers") as bar:
        for asked in questions:
            turns = [*system, {"role": "user", "content": asked.question}]
            prompt = tokenizer.encode_parts(prompt_parts(turns, tokenizer.special_tokens, template))
            ids = greedy_answer(model.decoder, prompt, tokenizer.eos_id, max_new_tokens)
            samples.append(SampleAnswer(asked.question, tokenizer.decode(ids).strip(), asked.reference, asked.novelty))
            bar.advance()
    if run is not None:
        record = {"samples": [vars(sample) for sample in samples], "sampling": {"temperature": 0}}
        write_json(run.root / "samples.json", record)
    return samples


def greedy_answer(decoder: Decoder, prompt: Sequence[int], eos_id: int, max_new_tokens: int) -> list[int]:
    """The likeliest continuation of `prompt`, without the closing `eos_id`."""
    import torch

    from anychip.model.cache import KeyValueCache

    device = decoder.head_weight.device
    cache = KeyValueCache(decoder.config, 1, len(prompt) + max_new_tokens, decoder.compute_dtype, device)
    answer: list[int] = []
    pending = list(prompt)
    with torch.inference_mode():
        while len(answer) < max_new_tokens:
            hidden = decoder(torch.tensor([pending], device=device), cache)
            token = int(decoder.logits(hidden[0, -1]).argmax())
            if token == eos_id:
                break
            answer.append(token)
            pending = [token]
    return answer
