"""Held-out bits per byte after the same wall-clock time, from the same packed corpus, on this machine.

Three contestants of the same shape (the demo's) learn from the same tokens, one after the other: anychip with the demo
recipe's optimizer, the Hugging Face Trainer with its defaults (AdamW, linear decay) at a tuned rate, and a plain fp32
loop in the manner of nanoGPT (AdamW, cosine). Each first times a few steps and fits its schedule into the time that
is left; set-up and timing count. The score is over the same held-out documents. Needs the `bench` extra.

    anychip data prepare recipes/demo.yaml
    python benchmarks/five_minutes.py runs/demo --minutes 5
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from anychip.data.loader import TrainingData
from anychip.data.validation import validation_batches
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory

Step = Callable[[int, int], float]
Nats = Callable[[Tensor, Tensor], float]
PEER_LR = 1e-3
TIMED_STEPS = 8


def batches(run: RunDirectory, recipe: Recipe) -> Callable[[int], tuple[Tensor, Tensor]]:
    source = TrainingData(run, recipe)

    def get(step: int) -> tuple[Tensor, Tensor]:
        batch = source.batch(step)
        return batch.input_ids, batch.labels

    return get


def fit_steps(step: Step, started: float, seconds: float) -> int:
    """Train a few steps as if the run were long, then say how many fit into the time in all."""
    step(0, 10**6)
    begin = time.perf_counter()
    for number in range(1, TIMED_STEPS + 1):
        step(number, 10**6)
    each = (time.perf_counter() - begin) / TIMED_STEPS
    left = seconds - (time.perf_counter() - started)
    return TIMED_STEPS + 1 + int(left / each)


def train_for(step: Step, started: float, seconds: float) -> int:
    """Train until the time is up; the schedule ends with it."""
    steps = fit_steps(step, started, seconds)
    for number in range(TIMED_STEPS + 1, steps):
        step(number, steps)
        if time.perf_counter() - started > seconds:
            return number + 1
    return steps


def anychip(run: RunDirectory, recipe: Recipe, seconds: float) -> tuple[Nats, int]:
    from anychip.chips.backend import detect_backend
    from anychip.model.decoder import Decoder
    from anychip.model.init import init_parameters
    from anychip.train.loss import head_cross_entropy
    from anychip.train.optimizer import Optimizer
    from anychip.train.precision import compute_dtype
    from anychip.train.schedule import lr_share

    started = time.perf_counter()
    backend = detect_backend()
    backend.prepare_process()
    dtype = compute_dtype("auto", backend)
    model = Decoder(recipe.final_model, dtype)
    init_parameters(model, recipe.final_model, recipe.seed)
    optimizer = Optimizer(dict(model.named_parameters()), recipe.optimizer, dtype)
    get = batches(run, recipe)

    def step(number: int, steps: int) -> float:
        inputs, labels = get(number)
        loss = head_cross_entropy(model(inputs).flatten(0, 1), model.lm_head.weight, labels.flatten(), 512)
        (loss / labels.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.grad_clip)
        optimizer.step(recipe.optimizer.lr * lr_share(recipe.optimizer.schedule, number, steps))
        model.zero_grad(set_to_none=True)
        return loss.item()

    steps = train_for(step, started, seconds)

    def nats(inputs: Tensor, labels: Tensor) -> float:
        return head_cross_entropy(model(inputs).flatten(0, 1), model.lm_head.weight, labels.flatten(), 512).item()

    return nats, steps


def hf_model(recipe: Recipe) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = recipe.final_model
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        use_cache=False,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def hf_nats(model: torch.nn.Module) -> Nats:
    def nats(inputs: Tensor, labels: Tensor) -> float:
        logits = model(input_ids=inputs).logits.float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").item()

    return nats


def hf_trainer(run: RunDirectory, recipe: Recipe, seconds: float) -> tuple[Nats, int]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    started = time.perf_counter()
    model = hf_model(recipe)
    get = batches(run, recipe)
    batch_size = recipe.training.global_batch_size

    class Rows(torch.utils.data.Dataset):
        """Row i of the same global order; Trainer reads it in order."""

        def __len__(self) -> int:
            return 10**7

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            inputs, labels = get(index // batch_size)
            row = index % batch_size
            return {"input_ids": inputs[row], "labels": torch.cat((inputs[row, :1], labels[row, :-1]))}

    class Timed(TrainerCallback):
        """Times the first steps, then shortens the schedule so that it ends with the time."""

        def on_step_end(self, args, state, control, **_):
            if time.perf_counter() - started > seconds:
                control.should_training_stop = True

    def arguments(steps: int, folder: str) -> TrainingArguments:
        return TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=PEER_LR,
            warmup_steps=20,
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            bf16=torch.cpu.get_capabilities().get("avx512_bf16", False),
        )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        timing = InOrder(model=hf_model(recipe), args=arguments(TIMED_STEPS, folder), train_dataset=Rows())
        begin = time.perf_counter()
        timing.train()
        each = (time.perf_counter() - begin) / TIMED_STEPS
        steps = int((seconds - (time.perf_counter() - started)) / each)
        trainer = InOrder(model=model, args=arguments(steps, folder), train_dataset=Rows(), callbacks=[Timed()])
        trainer.train()
        steps = trainer.state.global_step
    model.eval()
    return hf_nats(model), steps


def nanogpt_style(run: RunDirectory, recipe: Recipe, seconds: float) -> tuple[Nats, int]:
    started = time.perf_counter()
    model = hf_model(recipe)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEER_LR, betas=(0.9, 0.95), fused=True)
    get = batches(run, recipe)

    def step(number: int, steps: int) -> float:
        inputs, labels = get(number)
        share = min(1.0, (number + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, number / steps))))
        for group in optimizer.param_groups:
            group["lr"] = PEER_LR * share
        logits = model(input_ids=inputs).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    steps = train_for(step, started, seconds)
    return hf_nats(model), steps


CONTESTANTS = {"anychip": anychip, "HF Trainer": hf_trainer, "nanoGPT-style fp32 loop": nanogpt_style}


def work(name: str, run: RunDirectory, minutes: float) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    recipe = run.read_recipe()
    nats, steps = CONTESTANTS[name](run, recipe, minutes * 60)
    total, text_bytes = 0.0, 0
    with torch.no_grad():
        for batch, size in validation_batches(run, recipe, recipe.training.micro_batch_size, recipe.eval.max_tokens):
            total += nats(batch.input_ids, batch.labels)
            text_bytes += size
    print(json.dumps({"bits_per_byte": total / math.log(2) / text_bytes, "steps": steps}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--worker", choices=CONTESTANTS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, RunDirectory(arguments.run), arguments.minutes)
        return
    print(f"| {arguments.minutes:g} minutes | steps | held-out bits per byte |\n|---|---|---|")
    for name in CONTESTANTS:
        command = [sys.executable, __file__, str(arguments.run), "--minutes", str(arguments.minutes), "--worker", name]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        result = json.loads(answer)
        print(f"| {name} | {result['steps']:,} | {result['bits_per_byte']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
