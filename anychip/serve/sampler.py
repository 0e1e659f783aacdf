"""The engine as a writer of answers for tuning: with weights that are in training, many prompts at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from anychip import alive
from anychip.model.decoder import Decoder
from anychip.parallel.processes import Processes
from anychip.recipe.schema import ModelConfig, SamplingConfig
from anychip.serve.engine import Engine
from anychip.serve.inference import InferenceModel
from anychip.serve.parts import WHOLE, FollowingPart, Part, join_training
from anychip.serve.request import Request
from anychip.tune.sampler import Asked, Said


class _EndsWith:
    """A constraint that forbids nothing and ends an answer behind a token, which is then a part of it: that an answer
    ends is learned too."""

    def __init__(self, token: int) -> None:
        self._token = token

    def mask(self, logits: Tensor) -> Tensor:
        return logits

    def accept(self, token: int) -> bool:
        return token != self._token


class EngineSampler:
    """Answers with the serving engine in this process, or in those that share matrices (a `Sampler`). Answers of one
    call do not depend on those of earlier ones; they depend on their neighbours by the rounding of sums alone."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, end_id: int, max_batch: int) -> None:
        """`dtype` is that of the matrices, the one in which training multiplies."""
        self._config, self._dtype, self._end_id, self._max_batch = config, dtype, end_id, max_batch
        self._engine: Engine | None = None
        self._part: Part = WHOLE

    def join(self, processes: Processes) -> int:
        self._part = join_training(processes)
        return self._part.size

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._engine = None  # before there is memory for the next one
        with torch.device("meta"):
            decoder = Decoder(self._config)
        for name, tensor in weights:
            module, _, leaf = name.rpartition(".")
            kept = self._part.cut(name, tensor.to(self._dtype) if _is_multiplied(name, tensor) else tensor)
            setattr(decoder.get_submodule(module), leaf, nn.Parameter(kept, requires_grad=False))
        model = InferenceModel(decoder, self._dtype, release=True, part=self._part)
        self._engine = Engine(model, max_batch=self._max_batch)

    def sample(self, asked: Sequence[Asked], seed: int, max_new_tokens: int, *, greedy: bool = False) -> list[Said]:
        if self._engine is None:
            raise ValueError("load weights first")
        if isinstance(self._part, FollowingPart):
            self._part.follow(self._engine.model)
            return []
        sampling = SamplingConfig(temperature=0.0 if greedy else 1.0, max_new_tokens=max_new_tokens)
        ends = _EndsWith(self._end_id)
        requests = [
            Request(str(number), one.prompt, sampling, seed=seed, draws=one.draws, constraint=ends, top_logprobs=0)
            for number, one in enumerate(asked)
        ]
        tokens: list[list[int]] = [[] for _ in requests]
        drawn: list[list[float]] = [[] for _ in requests]
        for event in self._engine.run(requests):
            alive.progressed()
            if event.token is not None:
                assert event.logprob is not None
                tokens[int(event.request_id)].append(event.token)
                drawn[int(event.request_id)].append(event.logprob.logprob)
        self._part.end()
        return [Said(*pair) for pair in zip(tokens, drawn, strict=True)]


def _is_multiplied(name: str, tensor: Tensor) -> bool:
    """Whether it is a matrix in the dtype of the products; routers choose in fp32."""
    return tensor.dim() > 1 and ".mlp.gate." not in name
