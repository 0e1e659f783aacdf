"""What a traced step leaves: sketches of activations, gradients, weights and updates, the same under every layout.

Every process sketches the parts it holds; the sums over processes are those of the whole tensors. Nothing is gathered.
Forward passes are seen by hooks on the modules, and by wrapping the three operators that are no modules.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from anychip import __version__
from anychip.chips.backend import detect_backend
from anychip.model.arithmetic import parameter_shapes
from anychip.parallel.context import split_positions
from anychip.parallel.gradients import COPY_AXES, gradient_norm, sharded_axes
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import local
from anychip.train.engine import Engine
from anychip.train.job import TrainingJob
from anychip.train.observe import Observer
from anychip.verify.names import Activation, Kind, activations
from anychip.verify.sketch import COUNT, LENGTH, summarize
from anychip.verify.trace import Sketch, TracedStep, TraceWriter

_ROW_STRIDE = 1 << 24  # tokens a row may have: a token's number is its row's times this plus its position
Key = tuple[Kind, str]


class Recorder(Observer):
    """Traces step 1, then every `interval` steps, and the loss of every step, into a file.

    `seconds` counts the time that it took of this process. Layers must not be compiled: their hooks would not run.
    """

    def __init__(self, path: Path, interval: int, header: dict[str, Any], max_bytes: int) -> None:
        self._path, self._interval, self._header, self._max_bytes = path, interval, header, max_bytes
        self._writer: TraceWriter | None = None
        self._step, self._lr, self._tracing = 0, 0.0, False
        self._passes: dict[int, int] = {}  # forward passes of each part in this step
        self._pass: int | None = None  # the one that a part is in
        self._sums: dict[Key, Tensor] = {}
        self._scalars: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self.seconds = 0.0

    def attach(self, job: TrainingJob, engine: Engine, processes: Processes) -> None:
        self._job, self._engine, self._processes = job, engine, processes
        self._rows = processes.rows(job.global_batch_size, job.micro_batch_size, job.seq_length)
        self._keys: list[Key] = [
            *(("parameter", name) for name, _ in parameter_shapes(job.model)),
            *(("activation", a.name) for a in activations(job.model)),
            *(("gradient", a.name) for a in activations(job.model)),
            *(("parameter_gradient", name) for name, _ in parameter_shapes(job.model)),
            *(("update", name) for name, _ in parameter_shapes(job.model)),
        ]
        if processes.is_first:
            header = {
                **self._header,
                "anychip": __version__,
                "chip": detect_backend().vendor,
                "dtype": str(engine.parts[0].compute_dtype).removeprefix("torch."),
                "layout": processes.layout.describe(),
                "micro_batch_size": job.micro_batch_size,
                "interval": self._interval,
            }
            self._writer = TraceWriter(self._path, header, self._max_bytes)
        for part in engine.parts:
            self._watch(part)

    def begin(self, step: int, lr: float) -> None:
        self._step, self._lr, self._passes = step, lr, {}
        self._tracing = step == 1 or step % self._interval == 0
        self._sums, self._scalars = {}, {"lr": lr}

    def reduced(self, loss: float, grad_norm: float) -> None:
        if self._writer is not None:
            self._writer.write_loss(self._step, loss, grad_norm)
        if not self._tracing:
            return
        started = time.perf_counter()
        self._scalars.update(loss=loss, grad_norm=grad_norm)
        for name, parameter in self._engine.parameters.items():
            self._note_block("parameter", name, parameter, local(parameter.detach()))
            if parameter.grad is not None:
                self._note_block("parameter_gradient", name, parameter, local(parameter.grad))
        self.seconds += time.perf_counter() - started

    def clipped(self) -> None:
        if self._tracing:
            started = time.perf_counter()
            norm = gradient_norm(self._engine.parameters.values(), self._processes)
            self._scalars["applied_grad_norm"] = float(norm)
            self._before = {name: local(p.detach()).clone() for name, p in self._engine.parameters.items()}
            self.seconds += time.perf_counter() - started

    def updated(self) -> None:
        if not self._tracing:
            return
        started = time.perf_counter()
        along = torch.zeros(2, dtype=torch.float32, device=self._processes.device)
        for name, parameter in self._engine.parameters.items():
            before = self._before.pop(name)
            update = local(parameter.detach()) - before
            self._note_block("update", name, parameter, update)
            if parameter.ndim == 2 and self._counts_here(parameter):
                along += torch.stack(((update * before).sum(), before.square().sum())).to(along)
        dot, squares = self._processes.sum(along).tolist()
        if squares and self._lr:
            self._scalars["decay"] = -dot / squares / self._lr
            self._scalars["decay_size"] = squares
        self._tracing = False
        self._write()
        self.seconds += time.perf_counter() - started

    def _write(self) -> None:
        """Add up over processes; every process takes part, the first one writes."""
        wide = torch.float64 if self._processes.device.type == "cpu" else torch.float32
        nothing = torch.zeros(LENGTH, dtype=wide, device=self._processes.device)
        rows = [self._sums[key].to(wide) if key in self._sums else nothing for key in self._keys]
        total = self._processes.sum(torch.stack(rows)).cpu()
        self._sums = {}
        if self._writer is not None:
            seen = {key: Sketch.of(row) for key, row in zip(self._keys, total, strict=True) if row[COUNT] > 0}
            self._writer.write_step(TracedStep(self._step, seen, dict(self._scalars)))

    # Forward passes

    def _watch(self, part: Any) -> None:
        part.register_forward_pre_hook(self._enter)
        part.register_forward_hook(self._leave)
        split = {activation.name: activation for activation in activations(self._job.model)}
        for name, activation in split.items():
            owner, _, last = name.rpartition(".")
            try:
                module = part.get_submodule(owner if last == "output" else name)
            except AttributeError:  # of another stage, or no module
                continue
            if module is not None:
                module.register_forward_hook(partial(self._hook, activation))
        for number, layer in part.layers.named_children():
            prefix = f"layers.{number}"
            attention, mlp = layer.self_attn, layer.mlp
            attention.rotate = self._rotations(attention.rotate, f"{prefix}.self_attn")
            attention.attend = self._wrapped(attention.attend, split[f"{prefix}.self_attn.attended"], _heads_last)
            mlp.swiglu = self._wrapped(mlp.swiglu, split[f"{prefix}.mlp.swiglu"], lambda x: x)

    def _enter(self, part: Any, inputs: Any) -> None:
        """Only this step's own passes count: what is computed again to check them comes after them."""
        if self._tracing and torch.is_grad_enabled():
            number = self._passes.get(id(part), 0)
            self._passes[id(part)] = number + 1
            self._pass = number if number < len(self._rows) // self._job.micro_batch_size else None

    def _leave(self, part: Any, inputs: Any, output: Any) -> None:
        self._pass = None

    def _hook(self, activation: Activation, module: Any, inputs: Any, output: Tensor) -> None:
        self._see(activation, output, lambda x: x)

    def _wrapped(
        self, operator: Callable[..., Tensor], activation: Activation, shape: Callable[[Tensor], Tensor]
    ) -> Callable[..., Tensor]:
        def run(*args: Any, **keywords: Any) -> Tensor:
            out = operator(*args, **keywords)
            self._see(activation, out, shape)
            return out

        return run

    def _rotations(self, operator: Callable[..., Tensor], prefix: str) -> Callable[..., Tensor]:
        """Queries are rotated first, then keys."""
        calls = 0

        def run(*args: Any, **keywords: Any) -> Tensor:
            nonlocal calls
            out = operator(*args, **keywords)
            if self._pass is not None:
                which = "q" if calls % 2 == 0 else "k"
                calls += 1
                self._see(Activation(f"{prefix}.rotated_{which}", "columns"), out, lambda x: x.flatten(2))
            return out

        return run

    def _see(self, activation: Activation, output: Tensor, shape: Callable[[Tensor], Tensor]) -> None:
        """Sketch an output now, and its gradient when backward comes to it. What backward computes again is not inside
        a part's forward pass, and not seen again."""
        if self._pass is None:
            return
        started = time.perf_counter()
        start = self._rows.start + self._pass * self._job.micro_batch_size
        self._note_tokens("activation", activation, shape(output.detach()), start)
        if output.requires_grad:
            seen: list[None] = []

            def backward(gradient: Tensor) -> None:
                if not seen and self._tracing:
                    seen.append(None)
                    self._note_tokens("gradient", activation, shape(gradient.detach()), start)

            output.register_hook(backward)
        self.seconds += time.perf_counter() - started

    def _note_tokens(self, kind: Kind, activation: Activation, x: Tensor, first_row: int) -> None:
        """x [b, s, c]: tokens are numbered by their place in the global batch, columns by their place in the model."""
        layout, place = self._processes.layout, self._processes.place
        parts = layout.tensor if activation.split == "sequence" else 1
        here = split_positions(x.shape[1] * parts * layout.context, layout.context, place.context)
        if parts > 1:
            here = here.chunk(parts)[place.tensor]
        if int(here[-1]) >= self._job.seq_length:  # filled up to what the layout divides
            real = here < self._job.seq_length
            x, here = x[:, real.to(x.device)], here[real]
        rows = (first_row + torch.arange(x.shape[0]))[:, None] * _ROW_STRIDE + here
        offset = place.tensor * x.shape[2] if activation.split == "columns" else 0
        columns = torch.arange(offset, offset + x.shape[2])
        self._add((kind, activation.name), summarize(x.flatten(0, 1), rows.flatten(), columns))

    # Parameters and what belongs to them

    def _note_block(self, kind: Kind, name: str, parameter: Tensor, part: Tensor) -> None:
        """A tensor laid out as a parameter is: this process's part, unless a lower rank holds the same."""
        if not self._counts_here(parameter) or part.numel() == 0:
            return
        offsets: tuple[int, ...] = (0,) * part.ndim
        if isinstance(parameter, DTensor):
            _, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
        block = part if part.ndim == 2 else part.reshape(1, -1)
        first_row, first_column = offsets if part.ndim == 2 else (0, offsets[0])
        rows = torch.arange(first_row, first_row + block.shape[0])
        columns = torch.arange(first_column, first_column + block.shape[1])
        self._add((kind, name), summarize(block, rows, columns))

    def _counts_here(self, parameter: Tensor) -> bool:
        shared = sharded_axes(parameter)
        return all(getattr(self._processes.place, axis) == 0 for axis in COPY_AXES if axis not in shared)

    def _add(self, key: Key, summary: Tensor) -> None:
        self._sums[key] = self._sums[key] + summary if key in self._sums else summary


def _heads_last(mixed: Tensor) -> Tensor:
    """[b, n, s, d] -> [b, s, n * d]"""
    return mixed.transpose(1, 2).flatten(2)
