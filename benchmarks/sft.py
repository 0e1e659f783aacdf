"""Tuning throughput beside pretraining, steps interleaved in one process, on the demo's shape.

Both count tokens that are learned from or attended to; padding counts for nothing. Prints a Markdown table of medians.

    python benchmarks/sft.py
    python benchmarks/sft.py --rounds 20 --seq-length 512
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory


def main() -> None:
    import torch

    from anychip.chips.backend import detect_backend
    from anychip.chips.operators import operators_for
    from anychip.data.batch import Batch
    from anychip.data.tokenizer import train_bpe
    from anychip.parallel.parts import initialize_parts
    from anychip.parallel.processes import Processes
    from anychip.recipe import load_recipe
    from anychip.rundir import RunDirectory
    from anychip.train.engine import Engine
    from anychip.train.guard import Guard
    from anychip.train.heartbeat import Heartbeat
    from anychip.train.job import training_job
    from anychip.train.optimizer import Optimizer
    from anychip.train.precision import compute_dtype
    from anychip.train.step import train_step
    from anychip.tune.sft import SftData

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args()
    backend = detect_backend()
    backend.prepare_process()
    device, rows, seq = backend.device(0), options.rows, options.seq_length
    batch = [f"training.{name}={value}" for name, value in
             (("seq_length", seq), ("micro_batch_size", rows), ("global_batch_size", rows))]  # fmt: skip
    tune = [word.replace("training.", "tune.sft.") for word in batch] + ["tune.sft.subjects=[]"]
    demo = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    recipe = load_recipe(demo, [*batch, *tune])
    with TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        texts = (path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].glob("docs/en/*.md")))
        train_bpe(texts, recipe.model.vocab_size).save(run.tokenizer)
        sources = {
            packing: SftData(load_recipe(demo, [*batch, *tune, f"tune.sft.packing={packing}"]), run)
            for packing in (True, False)
        }

    def pretraining(step: int) -> Batch:
        tokens = torch.randint(16, recipe.model.vocab_size, (rows, seq + 1))
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def tokens_in(batch: Batch) -> int:
        if batch.documents is not None:
            return int((batch.documents >= 0).sum())
        return int((batch.input_ids != 3).sum())

    contestants = {
        "pretraining": pretraining,
        "SFT, packed": sources[True].batch,
        "SFT, a dialog a row": sources[False].batch,
    }
    job = training_job(recipe, Path(), sources[True], lambda parameters: None, None, "")
    dtype = compute_dtype(job.compute_dtype, backend)
    processes = Processes.join(job.parallel, device, backend.collective_backend)
    operators = operators_for(backend.vendor, job.operators)
    engine = Engine(job, processes, dtype, operators)
    initialize_parts(engine.parameters, recipe.model, 0)
    optimizer = Optimizer(engine.parameters, job.optimizer, dtype, operators)
    guard, heartbeat = Guard(job.guard), Heartbeat.of_environment(0)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    filled: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(options.rounds + 2):  # two rounds warm up
        for name, source in contestants.items():
            given = source(number)
            started = time.perf_counter()
            train_step(engine, optimizer, processes, given, 1e-5, 1.0, guard, heartbeat)
            seconds = time.perf_counter() - started
            if number >= 2:
                rates[name].append(tokens_in(given) / seconds)
                filled[name].append(tokens_in(given) / given.input_ids.numel())
    plain = statistics.median(rates["pretraining"])
    print(f"demo shape, {rows} rows of {seq}, {dtype}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print("| batch | tokens/s | x pretraining | tokens that are no padding |\n|---|---|---|---|")
    for name, found in rates.items():
        rate = statistics.median(found)
        print(f"| {name} | {rate:,.0f} | {rate / plain:.2f} | {statistics.mean(filled[name]):.1%} |")


if __name__ == "__main__":
    main()
