"""What a trace does to the model it is of: nothing that stays, and nothing at all in steps that are not traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layout_runs import LayoutRun, build
from traced_runs import train_traced

from anychip.verify.compare import compare
from anychip.verify.record import Recorder
from anychip.verify.trace import read_trace


def traces_of(job: dict[str, Any], path: Path, *, repeating: bool = False) -> Path:
    """A step of this process alone; `repeating`: a pass of it is computed twice, as a replay does."""
    job, processes, engine, optimizer = build(LayoutRun({}, 4, {"dtype": "float32", **job}), 1)
    recorder = Recorder(path, 100, {}, 1 << 28)
    real = engine.forward_backward

    def twice(batch: Any) -> Any:
        engine.repeat_pass(batch, 0, 1)
        for parameter in engine.parameters.values():
            parameter.grad = None
        return real(batch)

    if repeating:
        engine.forward_backward = twice
    train_traced(job, processes, engine, optimizer, recorder, 1)
    return path


def looked_at(engine: Any) -> dict[str, Any]:
    """Everything in a model that somebody who looks on could have changed."""
    found: dict[str, Any] = {"repeat_pass": engine.repeat_pass}
    for part in engine.parts:
        for name, module in part.named_modules():
            hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("hooks")}
            own = {key: value for key, value in vars(module).items() if callable(value)}
            found[name] = hooks, own
    return found


def test_only_a_traced_step_is_looked_at(tmp_path: Path) -> None:
    job, processes, engine, _ = build(LayoutRun({}, 4, {"dtype": "float32"}), 1)
    before = looked_at(engine)
    recorder = Recorder(tmp_path / "trace", 100, {}, 1 << 28)
    recorder.attach(job, engine, processes)
    assert looked_at(engine) == before
    recorder.begin(1, 1e-3)
    assert looked_at(engine) != before
    recorder.begin(2, 1e-3)  # the first one was given up
    assert looked_at(engine) == before
    recorder.begin(100, 1e-3)
    loss = float(engine.forward_backward(job.source.batch(0)))
    recorder.reduced(loss, 1.0)
    assert looked_at(engine) == before


def test_a_pass_that_is_computed_again_to_check_it_is_not_traced_twice(tmp_path: Path) -> None:
    one, other = (
        read_trace(traces_of({}, tmp_path / name, repeating=repeating))
        for name, repeating in (("once", False), ("twice", True))
    )
    assert compare(one, other).outcome == "equal"


@pytest.mark.parametrize(
    ("model", "output"), [("softmax", "layers.1.mlp"), ("sigmoid", "layers.1.self_attn.kv_b_proj")]
)
def test_models_with_experts_and_latent_attention_are_traced(model: str, output: str, tmp_path: Path) -> None:
    kept, again = (
        read_trace(traces_of({"model": model, "recompute": recompute}, tmp_path / recompute))
        for recompute in ("none", "full")
    )
    names = {name for kind, name in kept.steps[1].tensors if kind == "gradient"}
    assert {output, "norm", "layers.0.output"} <= names
    assert any("experts.down_proj" in name for kind, name in kept.steps[1].tensors if kind == "update")
    found = compare(kept, again)
    assert found.outcome == "equal" and not found.only_in_one
