"""Contestants of a training benchmark: each trains one step when asked, in a process of its own, so that steps of all
alternate and peak memory is each one's own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

SLOW_SECONDS = 60.0
Step = Callable[[], None]


def anychip_step(config: Any, batch: int, seq: int, dtype_name: str, compiled: bool) -> Step:
    """Forward, backward, clipping and AdamW as anychip trains, on random tokens [batch, seq]."""
    import torch

    from anychip.chips.backend import detect_backend
    from anychip.chips.operators import operators_for
    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.recipe.schema import OptimizerConfig, TrainingConfig
    from anychip.train.engine import prove_attention
    from anychip.train.loss import head_cross_entropy
    from anychip.train.optimizer import Optimizer
    from anychip.train.precision import compute_dtype
    from anychip.train.recompute import apply_recompute

    backend = detect_backend()
    backend.prepare_process()
    training = TrainingConfig(steps=1)
    dtype, operators = compute_dtype(dtype_name, backend), operators_for(backend.vendor)
    model = Decoder(config, dtype, operators)
    init_parameters(model, config, 0)
    apply_recompute(model, training.recompute)
    if compiled:
        prove_attention(config, dtype, operators, torch.device("cpu"))
        for layer in model.layers:
            layer.compile(dynamic=False)
    optimizer = Optimizer(dict(model.named_parameters()), OptimizerConfig(), dtype, operators)
    learned = [p for name, p in model.named_parameters() if not name.endswith("correction_bias")]
    tokens = torch.randint(0, config.vocab_size, (batch, seq + 1))

    def step() -> None:
        loss = head_cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1),
            model.head_weight,
            tokens[:, 1:].flatten(),
            training.loss_chunk_tokens,
            cross_entropy=operators.cross_entropy,
        )
        (loss / (batch * seq)).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step(3e-4)
        model.zero_grad(set_to_none=True)

    return step


def transformers_step(model: Any, batch: int, seq: int, dtype_name: str, compiled: bool = False) -> Step:
    """The same by a model of Hugging Face transformers, under autocast for bf16."""
    import torch

    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, (batch, seq))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype_name == "bf16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def set_threads() -> None:
    """As many as OMP_NUM_THREADS says, else one a core."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


def answer(step: Step) -> None:
    """Train one step for each line read; answer with its seconds and the peak memory so far."""
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "memory": memory}), flush=True)


class Contestant:
    """A process of this script, started with these arguments, that answers."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, sys.argv[0], *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.memory = 0

    def step(self, keep: bool) -> None:
        """Train one step. One that takes minutes is asked once only: its warm-up is nothing beside it."""
        if self.seconds and self.seconds[0] > SLOW_SECONDS:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        print("step", file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.memory = answer["memory"]
        if keep or answer["seconds"] > SLOW_SECONDS:
            self.seconds.append(answer["seconds"])


def take_turns(contestants: Iterable[Contestant], rounds: int, warm_up: int) -> None:
    """Steps of all in turn; those of the first rounds warm up and compile."""
    contestants = list(contestants)
    for number in range(rounds + warm_up):
        for contestant in contestants:
            contestant.step(keep=number >= warm_up)
