"""Traces and msprobe's dumps as files: read back as written, and refused in one paragraph otherwise."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anychip.errors import InputError
from anychip.verify.compare import compare, read_either
from anychip.verify.msprobe import read_msprobe
from anychip.verify.sketch import summarize
from anychip.verify.trace import Sketch, TracedStep, TraceWriter, read_trace

ANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def sketch(seed: int = 0) -> Sketch:
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
    return Sketch.of(summarize(x, torch.arange(40), torch.arange(30)))


def write(path: Path, steps: int = 3, max_bytes: int = 1 << 20) -> Path:
    writer = TraceWriter(path, {"recipe": "tiny", "dtype": "float32"}, max_bytes)
    for step in range(1, steps + 1):
        writer.write_loss(step, 5.0 / step, 1.0)
        writer.write_step(TracedStep(step, {("activation", "norm"): sketch(step)}, {"loss": 5.0 / step}))
    return path


def test_a_sketch_tells_the_distance_of_two_tensors() -> None:
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(300, 200, generator=chance)
    for share in (1e-4, 1e-1):
        y = x + share * torch.randn(300, 200, generator=chance)
        rows, columns = torch.arange(300), torch.arange(200)
        one, other = (Sketch.of(summarize(each, rows, columns)) for each in (x, y))
        assert one.sketch is not None and other.sketch is not None
        told = float(np.linalg.norm(one.sketch - other.sketch)) / one.norm
        assert told == pytest.approx(share, rel=0.4)
        assert one.norm == pytest.approx(float(x.norm()), rel=1e-6)


def test_parts_of_a_tensor_add_up_to_the_whole() -> None:
    x = torch.randn(24, 36, dtype=torch.float64)
    rows, columns = torch.randperm(1000)[:24], torch.arange(36)
    whole = summarize(x, rows, columns)
    parts = [
        summarize(x[r][:, c], rows[r], columns[c])
        for r in (slice(0, 7), slice(7, 24))
        for c in (slice(0, 30), slice(30, 36))
    ]
    assert torch.allclose(sum(parts), whole, rtol=1e-12, atol=1e-12)


def test_infinities_are_counted_and_do_not_spread() -> None:
    x = torch.ones(4, 4)
    x[1, 2] = torch.inf
    found = Sketch.of(summarize(x, torch.arange(4), torch.arange(4)))
    assert found.nonfinite == 1 and found.squares == 15


def test_a_trace_is_read_as_written(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "a.trace"))
    assert trace.header == {"recipe": "tiny", "dtype": "float32"}
    assert trace.losses == {1: 5.0, 2: 2.5, 3: 5.0 / 3}
    entry, right = trace.steps[2].tensors[("activation", "norm")], sketch(2)
    assert entry.sketch is not None and right.sketch is not None
    assert entry.norm == right.norm and (entry.sketch == right.sketch).all()


def test_a_trace_stops_at_its_size_and_losses_go_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.trace", steps=20, max_bytes=4000)
    assert path.stat().st_size < 8000
    trace = read_trace(path)
    assert len(trace.losses) == 20 and 0 < len(trace.steps) < 4


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.trace")
    path.write_bytes(path.read_bytes()[:-100])
    assert sorted(read_trace(path).steps) == [1, 2]


def test_traces_without_a_common_step_are_refused(tmp_path: Path) -> None:
    one, other = (read_trace(write(tmp_path / name)) for name in "ab")
    other.steps.clear()
    with pytest.raises(InputError, match="common"):
        compare(one, other)


@ANY
@given(st.lists(JSON, max_size=4), st.booleans())
def test_any_json_is_a_trace_or_refused(lines: list[Any], headed: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.trace"
        head = [json.dumps({"anychip_trace": 1})] if headed else []
        path.write_text("\n".join(head + [json.dumps(line) for line in lines]) + "\n", encoding="utf-8")
        with contextlib.suppress(InputError):
            read_trace(path)


@ANY
@given(st.data())
def test_a_changed_trace_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path / "a.trace")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    with contextlib.suppress(InputError):
        compare(read_trace(path), read_trace(write(tmp_path / "b.trace")))


# msprobe: entries as its documentation shows them


def tensor(norm: float, mean: float = 0.0, shape: tuple[int, ...] = (2, 8, 16)) -> dict[str, Any]:
    return {
        "type": "torch.Tensor",
        "dtype": "torch.bfloat16",
        "shape": list(shape),
        "Max": 3.0,
        "Min": -3.0,
        "Mean": mean,
        "Norm": norm,
        "requires_grad": True,
    }


def dump(folder: Path, norms: dict[str, float], step: int = 0) -> Path:
    """q_proj of layer 0, forward and backward, and its gradient."""
    data: dict[str, Any] = {}
    for name, norm in norms.items():
        module = f"Module.0.model.layers.0.self_attn.{name}.Linear"
        data[f"{module}.forward.0"] = {
            "input_args": [tensor(1.0)],
            "input_kwargs": {},
            "output": [tensor(norm)],
            "parameters": {"weight": tensor(2.0, shape=(16, 16))},
        }
        data[f"{module}.backward.0"] = {"input": [tensor(norm / 10)], "output": [tensor(norm / 20)]}
        data[f"{module}.parameters_grad"] = {"weight": [tensor(norm / 5, shape=(16, 16))]}
    path = folder / f"step{step}" / "rank0"
    path.mkdir(parents=True)
    raw = {"task": "statistics", "level": "L0", "framework": "pytorch", "dump_data_dir": None, "data": data}
    (path / "dump.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def test_a_dump_of_msprobe_is_read_by_logical_names(tmp_path: Path) -> None:
    trace = read_either(dump(tmp_path, {"q_proj": 4.0}))
    step = trace.steps[1]
    assert set(step.tensors) == {
        ("activation", "layers.0.self_attn.q_proj"),
        ("gradient", "layers.0.self_attn.q_proj"),
        ("parameter_gradient", "layers.0.self_attn.q_proj.weight"),
    }
    assert step.tensors[("activation", "layers.0.self_attn.q_proj")].norm == pytest.approx(4.0)
    assert trace.header["dtype"] == "bfloat16"


def test_the_first_module_that_differs_between_two_dumps_is_named(tmp_path: Path) -> None:
    norms = {"q_proj": 4.0, "k_proj": 3.0, "v_proj": 2.0}
    one = read_either(dump(tmp_path / "a", norms))
    other = read_either(dump(tmp_path / "b", {**norms, "k_proj": 6.0}))
    found = compare(one, other)
    assert found.departure is not None
    assert (found.departure.direction, found.departure.name) == ("forward", "layers.0.self_attn.k_proj")
    assert compare(one, read_either(dump(tmp_path / "c", norms))).outcome == "equal"


def test_dumps_of_several_ranks_and_functions_are_refused(tmp_path: Path) -> None:
    dump(tmp_path, {"q_proj": 4.0})
    (tmp_path / "step0" / "rank0").rename(tmp_path / "step0" / "rank1")
    dump(tmp_path / "again", {"q_proj": 4.0})
    (tmp_path / "again/step0/rank0").rename(tmp_path / "step0" / "rank0")
    with pytest.raises(InputError, match="several ranks"):
        read_msprobe(tmp_path)
    functions = tmp_path / "dump.json"
    functions.write_text('{"data": {"Functional.relu.0.forward": {"output": []}}}', encoding="utf-8")
    with pytest.raises(InputError, match="L0"):
        read_msprobe(functions)


NAMES = st.sampled_from([f"Module.{x}" for x in ("a.L.forward.0", "0.a.b.L.backward.3", "a.L.parameters_grad")])
ENTRY = st.fixed_dictionaries(
    {}, optional={"shape": JSON, "dtype": JSON, "Max": JSON, "Min": JSON, "Mean": JSON, "Norm": JSON}
)


@ANY
@given(JSON | st.fixed_dictionaries({"data": st.dictionaries(NAMES, JSON | st.fixed_dictionaries(
    {}, optional={"output": st.lists(ENTRY | JSON, max_size=2), "input": st.lists(ENTRY, max_size=2),
                  "weight": st.lists(ENTRY, max_size=2)}), max_size=3)}))  # fmt: skip
def test_any_json_is_a_dump_or_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "dump.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    try:
        trace = read_msprobe(path)
        compare(trace, trace)
    except InputError:
        pass
