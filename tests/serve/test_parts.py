"""A model over several processes answers what it answers in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import torch.distributed as dist
from expert_models import NAMED, random_decoder
from rank_pool import run_ranks
from tiny_run import write_tiny_recipe

from anychip.errors import InputError
from anychip.model.decoder import Decoder
from anychip.parallel.processes import Processes
from anychip.recipe.schema import ModelConfig, ParallelConfig
from anychip.serve.engine import Engine
from anychip.serve.inference import InferenceModel, Piece
from anychip.serve.parts import WHOLE, FollowingPart, LeadingPart, Part, SharedPart
from anychip.serve.request import Request
from anychip.serve.sampler import EngineSampler
from anychip.tune.sampler import Asked

sys.path.append(str(Path(__file__).parent))
from test_batch import WARM, drain, logprobs, prompts, tokens, trained_like

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4}


def requests() -> list[Request]:
    """Some begin alike, so that slots are copied, and one outgrows the first memory of the slots."""
    shared = prompts(1, [60])[0]
    asked = [*prompts(6, [3, 17, 60, 100]), shared, [*shared[:50], 30, 31], shared, prompts(1, [210])[0] * 2]
    return [
        Request(str(i), prompt, replace_length(40 if len(prompt) > 400 else 8), top_logprobs=0, seed=i)
        for i, prompt in enumerate(asked)
    ]


def replace_length(count: int):  # type: ignore[no-untyped-def]
    return WARM.model_copy(update={"max_new_tokens": count})


def answers(part: Part, dtype: torch.dtype) -> dict[str, tuple[list[int], list[float]]]:
    decoder = trained_like(**SIZES, max_position_embeddings=512)
    model = InferenceModel(decoder, dtype, part=part)
    if isinstance(part, FollowingPart):
        part.follow(model)
        return {}
    asked = requests()
    batch = Engine(model, max_batch=3, prefill_tokens=32).new_batch()
    found = drain(batch, {0: asked[:4], 3: asked[4:7], 20: asked[7:]})
    assert batch.slots.reused_tokens > 0
    part.end()
    return {name: (tokens(events), logprobs(events)) for name, events in found.items()}


def part_of_all(server: bool = False) -> SharedPart:
    words = dist.new_group(backend="gloo")
    return FollowingPart(None, words) if dist.get_rank() else LeadingPart(None, words, server=server)


def answer_in_parts(argument: tuple[Path, torch.dtype]) -> None:
    folder, dtype = argument
    leads = dist.get_rank() == 0
    found = answers(part_of_all(), dtype)
    if leads:
        (folder / "answers.json").write_text(json.dumps(found))


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_answer_as_one(processes: int, tmp_path: Path) -> None:
    run_ranks(processes, answer_in_parts, (tmp_path, torch.float32), tmp_path, timeout=120)
    found = json.loads((tmp_path / "answers.json").read_text())
    expected = answers(WHOLE, torch.float32)
    assert {name: ids for name, (ids, _) in found.items()} == {name: ids for name, (ids, _) in expected.items()}
    for name, (_, numbers) in expected.items():
        assert found[name][1] == pytest.approx(numbers, abs=1e-5)


def test_in_bf16_log_probabilities_stay_close(tmp_path: Path) -> None:
    run_ranks(2, answer_in_parts, (tmp_path, torch.bfloat16), tmp_path, timeout=120)
    found = json.loads((tmp_path / "answers.json").read_text())
    expected = answers(WHOLE, torch.bfloat16)
    for name, (ids, numbers) in expected.items():
        theirs, near = found[name]
        alike = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), len(ids))
        assert near[:alike] == pytest.approx(numbers[:alike], abs=2e-2)  # sums are rounded at other places


def steps_of(name: str, part: Part) -> list[list[float]]:
    """Logits after prompts in pieces and single tokens of two sequences together."""
    model = InferenceModel(random_decoder(ModelConfig(**NAMED[name]), torch.float32), torch.float32, part=part)
    if isinstance(part, FollowingPart):
        part.follow(model)
        return []
    slots = model.new_slots(2, 48)
    first, second = slots.slots
    ids = [(5 * i * i + 3 * i + 1) % 64 for i in range(40)]
    steps = [
        ([*ids[:20]], [Piece(first, 20)]),
        ([*ids[20:29], ids[9]], [Piece(second, 9), Piece(first, 1)]),
        ([ids[30], ids[31]], [Piece(first, 1), Piece(second, 1)]),
    ]
    found = [row for step, pieces in steps for row in model.forward(torch.tensor(step), pieces, slots).tolist()]
    part.end()
    return found


def step_in_parts(argument: tuple[Path, str]) -> None:
    folder, name = argument
    leads = dist.get_rank() == 0
    found = steps_of(name, part_of_all())
    if leads:
        (folder / "logits.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", ["softmax", "latent", "sigmoid"])
def test_experts_and_latent_attention_are_shared_out(name: str, tmp_path: Path) -> None:
    run_ranks(2, step_in_parts, (tmp_path, name), tmp_path, timeout=120)
    found = torch.tensor(json.loads((tmp_path / "logits.json").read_text()))
    torch.testing.assert_close(found, torch.tensor(steps_of(name, WHOLE)), atol=3e-5, rtol=1e-4)


def said_by(sampler: EngineSampler, decoder: Decoder) -> list[list[object]]:
    """Of two loads, as two steps of training make them: tokens and log-probabilities of each answer."""
    asked = [Asked(prompt, str(number)) for number, prompt in enumerate(prompts(5, [3, 17, 40]))]
    found: list[list[object]] = []
    for seed in (1, 2):
        sampler.load((name, parameter.detach().clone()) for name, parameter in decoder.named_parameters())
        found += [[list(one.tokens), list(one.log_probabilities)] for one in sampler.sample(asked, seed, 6)]
    return found


def sample_in_parts(folder: Path) -> None:
    processes = Processes.join(ParallelConfig(tensor_parallel=2), torch.device("cpu"), "gloo")
    decoder = trained_like(**SIZES)
    sampler = EngineSampler(decoder.config, torch.float32, 5, 3)
    assert sampler.join(processes) == 2
    found = said_by(sampler, decoder)
    if processes.rank % 2:
        assert found == []
    else:
        (folder / f"said-{processes.rank}.json").write_text(json.dumps(found))


def test_processes_that_share_matrices_write_answers_together(tmp_path: Path) -> None:
    """Two pairs of processes, each with the whole of a model between them."""
    run_ranks(4, sample_in_parts, tmp_path, tmp_path, timeout=120)
    decoder = trained_like(**SIZES)
    expected = said_by(EngineSampler(decoder.config, torch.float32, 5, 3), decoder)
    for pair in (0, 2):
        found = json.loads((tmp_path / f"said-{pair}.json").read_text())
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        for (_, numbers), (_, right) in zip(found, expected, strict=True):
            assert numbers == pytest.approx(right, abs=1e-5)


def test_experts_that_do_not_divide_are_refused() -> None:
    config = ModelConfig(**NAMED["sigmoid"])
    part = object.__new__(FollowingPart)
    for size, name in ((3, "num_key_value_heads 4"), (16, "num_key_value_heads 4")):
        part.size = size
        with pytest.raises(InputError, match=f"do not divide the model's {name}"):
            part.config(config)
    part.size = 4
    odd = config.model_copy(update={"n_routed_experts": 6})
    with pytest.raises(InputError, match="4 processes do not divide the model's n_routed_experts 6"):
        part.config(odd)
    assert part.config(config).num_attention_heads == 1


def refuse(_: object) -> None:
    part = part_of_all()
    with pytest.raises(InputError, match="3 processes do not divide the model's num_key_value_heads"):
        part.config(
            ModelConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    run_ranks(3, refuse, None, tmp_path, timeout=60)


def lose_a_part(folder: Path) -> None:
    """The follower leaves in the middle: the leader is told to end."""
    part = part_of_all(server=True)
    model = InferenceModel(trained_like(**SIZES), torch.float32, part=part)
    if isinstance(part, FollowingPart):
        part._receive()
        return
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    batch = Engine(model, max_batch=2).new_batch()
    batch.add(replace(requests()[0], id="lost"))
    with pytest.raises(RuntimeError):
        batch.step()
    assert told == [signal.SIGTERM]


def test_a_leader_without_its_followers_ends(tmp_path: Path) -> None:
    run_ranks(2, lose_a_part, tmp_path, tmp_path, timeout=60)


def test_torchrun_serves_and_ends_when_told(tmp_path: Path) -> None:
    recipe, anychip = write_tiny_recipe(tmp_path, steps=1), [sys.executable, "-m", "anychip"]
    for verb in (["data", "prepare"], ["train"]):
        subprocess.run([*anychip, *verb, str(recipe), "--runs", str(tmp_path)], check=True, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "anychip"]
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*torchrun, "serve", str(tmp_path / "tiny"), "--port", "0"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 120
        while "http://" not in log.read_text() and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        url = next(word for word in log.read_text().split() if word.startswith("http://")).rstrip("/")
        body = {"prompt": "the model reads", "max_tokens": 5, "logprobs": 0, "temperature": 0}
        first, second = (httpx.post(f"{url}/v1/completions", json=body, timeout=60).json() for _ in range(2))
        assert first["usage"]["completion_tokens"] == 5
        assert first["choices"] == second["choices"]
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    finally:
        server.kill()
    said = log.read_text()
    assert "ending: running answers are finished" in said
    assert "ChildFailedError" not in said and said.count("Traceback") == 1, said  # torchrun's own, of the signal
