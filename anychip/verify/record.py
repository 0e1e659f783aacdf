"""What a traced step leaves: sketches of activations, gradients, weights and updates, the same under every layout.

Every process sketches the parts it holds; the sums over processes are those of the whole tensors. Nothing is gathered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
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
from anychip.verify.sketch import COUNT, LENGTH, column_signs, row_signs, summarize, summarize_with
from anychip.verify.trace import Sketch, TracedStep, TraceWriter
from anychip.verify.watch import Watch

_ROW_STRIDE = 1 << 24  # tokens a row may have: a token's number is its row's times this plus its position
Key = tuple[Kind, str]


@dataclass(frozen=True)
class _Tokens:
    """The tokens of an output [b, s, c]: the signs of their numbers [b * s, 17], and which of the s are no filling."""

    signs: Tensor
    real: Tensor | None


class Recorder(Observer):
    """Traces the first step of a model, then every `interval` steps, and the loss of every step, into a file. A model
    that grew goes on in the same file.

    `seconds` counts the time that it took of this process. Layers must not be compiled: their hooks would not run.
    """

    def __init__(self, path: Path, interval: int, header: dict[str, Any], max_bytes: int) -> None:
        self._path, self._interval, self._header, self._max_bytes = path, interval, header, max_bytes
        self._writer: TraceWriter | None = None
        self._step, self._lr, self._tracing, self._is_new = 0, 0.0, False, True
        self._tokens: dict[tuple[Any, ...], _Tokens] = {}
        self._sums: dict[Key, Tensor] = {}
        self._scalars: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self.seconds = 0.0

    def attach(self, job: TrainingJob, engine: Engine, processes: Processes) -> None:
        self._job, self._engine, self._processes, self._is_new = job, engine, processes, True
        self._rows = processes.rows(job.global_batch_size, job.micro_batch_size, job.seq_length)
        self._watch = Watch(engine, job.model, len(self._rows) // job.micro_batch_size, self._note_tokens)
        self._keys: list[Key] = [
            *(("parameter", name) for name, _ in parameter_shapes(job.model)),
            *(("activation", a.name) for a in activations(job.model)),
            *(("gradient", a.name) for a in activations(job.model)),
            *(("parameter_gradient", name) for name, _ in parameter_shapes(job.model)),
            *(("update", name) for name, _ in parameter_shapes(job.model)),
        ]
        if processes.is_first and self._writer is None:
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

    def begin(self, step: int, lr: float) -> None:
        self._watch.stop()  # of a step that was given up
        self._step, self._lr = step, lr
        self._tracing, self._is_new = self._is_new or step % self._interval == 0, False
        self._sums, self._scalars = {}, {"lr": lr}
        if self._tracing:
            self._watch.start()

    def reduced(self, loss: float, grad_norm: float) -> None:
        self._watch.stop()
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
                dot = torch.dot(update.flatten(), before.flatten())
                along += torch.stack((dot, torch.linalg.vector_norm(before).square())).to(along)
        dot, squares = self._processes.sum(along).tolist()
        if squares and self._lr:
            self._scalars["decay"] = -dot / squares / self._lr
            self._scalars["decay_size"] = squares
        self._tracing = False
        self._tokens = {}
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

    # Outputs inside the model

    def _note_tokens(self, kind: Kind, activation: Activation, x: Tensor, number: int) -> None:
        """x [b, s, c] of a pass: tokens are numbered by their place in the global batch, columns by their place in the
        model."""
        started = time.perf_counter()
        layout, place = self._processes.layout, self._processes.place
        tokens = self._tokens_of(x, number, layout.tensor if activation.split == "sequence" else 1)
        if tokens.real is not None:
            x = x[:, tokens.real]
        offset = place.tensor * x.shape[2] if activation.split == "columns" else 0
        columns = column_signs(torch.arange(offset, offset + x.shape[2]), x)
        self._add((kind, activation.name), summarize_with(x.flatten(0, 1), tokens.signs, columns))
        self.seconds += time.perf_counter() - started

    def _tokens_of(self, x: Tensor, number: int, parts: int) -> _Tokens:
        """Those of all outputs of a pass are the same; `parts`: how many a sequence is split into by tensor
        parallelism."""
        key = (number, *x.shape[:2], parts, x.dtype)
        if key not in self._tokens:
            layout, place = self._processes.layout, self._processes.place
            here = split_positions(x.shape[1] * parts * layout.context, layout.context, place.context)
            if parts > 1:
                here = here.chunk(parts)[place.tensor]
            inside = here < self._job.seq_length
            real = None if bool(inside.all()) else inside.to(x.device)  # filled up to what the layout divides
            first_row = self._rows.start + number * self._job.micro_batch_size
            rows = (first_row + torch.arange(x.shape[0]))[:, None] * _ROW_STRIDE + here[inside]
            self._tokens[key] = _Tokens(row_signs(rows.flatten(), x), real)
        return self._tokens[key]

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
        rows = torch.zeros(1, dtype=torch.int64)
        for size, here, offset in zip(parameter.shape[:-1], part.shape[:-1], offsets[:-1], strict=True):
            rows = (rows[:, None] * size + torch.arange(offset, offset + here)).flatten()
        columns = torch.arange(offsets[-1], offsets[-1] + part.shape[-1])
        self._add((kind, name), summarize(part.reshape(len(rows), -1), rows, columns))

    def _counts_here(self, parameter: Tensor) -> bool:
        shared = sharded_axes(parameter)
        return all(getattr(self._processes.place, axis) == 0 for axis in COPY_AXES if axis not in shared)

    def _add(self, key: Key, summary: Tensor) -> None:
        self._sums[key] = self._sums[key] + summary if key in self._sums else summary
