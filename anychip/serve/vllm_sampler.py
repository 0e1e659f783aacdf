"""vLLM (or vllm-ascend) as a writer of answers for tuning, in each process of the job.

It is started on an export of the starting weights, in a layout whose configuration it reads without remote code, and
given the newest ones before every call. Not run on hardware yet: here it is tried against a stand-in for the library.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anychip.errors import InputError
from anychip.families.layouts import Layout, published_tensors
from anychip.interchange.layout import to_published
from anychip.parallel.processes import Processes
from anychip.recipe.schema import ModelConfig
from anychip.tune.sampler import Asked, Said


def layout_for_vllm(config: ModelConfig) -> Layout:
    """DeepSeek-V3's own for the family that has it, else plain Llama's or Mixtral's."""
    return "family" if config.family == "telechat3-moe" else "llama"


class VllmSampler:
    """A `Sampler`. The whole model, and vLLM's cache, must fit on the chip beside what is trained."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, end_id: int, max_batch: int, export: Path) -> None:
        """`export` holds the model's config.json and some weights of its shape, in `layout_for_vllm`. Raises InputError
        without vLLM."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine here, where its weights are set
        try:
            self._vllm: Any = import_module("vllm")
        except ImportError:
            raise InputError(
                "tune.grpo.sampler is vllm, which is not installed here.",
                do="Install vllm, or vllm-ascend on Ascend, or set tune.grpo.sampler to anychip.",
            ) from None
        self._config, self._dtype, self._end_id = config, dtype, end_id
        self._model: Any = self._vllm.LLM(
            model=str(export),
            tokenizer=str(export),
            trust_remote_code=False,
            dtype=str(dtype).removeprefix("torch."),
            max_num_seqs=max_batch,
            gpu_memory_utilization=0.3,
            seed=0,
        )

    def join(self, processes: Processes) -> int:
        """Each process has a vLLM of its own."""
        return 1

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        named = list(self._published(dict(weights)))
        self._model.apply_model(lambda model: model.load_weights(named))
        self._model.reset_prefix_cache()

    def sample(self, asked: Sequence[Asked], seed: int, max_new_tokens: int, *, greedy: bool = False) -> list[Said]:
        """vLLM draws by one number a request: it is made of the seed and the name of the draws."""
        from anychip.serve.sampling import uniform_draw

        settings = [
            self._vllm.SamplingParams(
                temperature=0.0 if greedy else 1.0,
                max_tokens=max_new_tokens,
                stop_token_ids=[self._end_id],
                ignore_eos=False,
                logprobs=0,
                detokenize=False,
                seed=int(uniform_draw(seed, one.draws, 0) * 2**31),
            )
            for one in asked
        ]
        prompts = [{"prompt_token_ids": list(one.prompt)} for one in asked]
        results = self._model.generate(prompts, settings, use_tqdm=False)
        return [_said(result.outputs[0]) for result in results]

    def _published(self, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Under the names, and in the layout, that vLLM reads from an export."""
        for tensor in published_tensors(self._config, layout_for_vllm(self._config)):
            yield (
                tensor.name,
                to_published(self._config, tensor, [weights[name] for name in tensor.logical]).to(self._dtype),
            )


def _said(output: Any) -> Said:
    """vLLM's token ids hold the token that ended the answer."""
    tokens = list(output.token_ids)
    return Said(tokens, [float(at[token].logprob) for token, at in zip(tokens, output.logprobs, strict=True)])
