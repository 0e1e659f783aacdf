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
from rank_pool import run_ranks
from tiny_run import write_tiny_recipe

from anychip.errors import InputError
from anychip.recipe.schema import ModelConfig
from anychip.serve.engine import Engine
from anychip.serve.inference import InferenceModel
from anychip.serve.parts import WHOLE, FollowingPart, LeadingPart, Part
from anychip.serve.request import Request

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


def answer_in_parts(argument: tuple[Path, torch.dtype]) -> None:
    folder, dtype = argument
    leads = dist.get_rank() == 0
    found = answers(LeadingPart() if leads else FollowingPart(), dtype)
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


def refuse(_: object) -> None:
    part = LeadingPart()
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
    part = LeadingPart() if dist.get_rank() == 0 else FollowingPart()
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
