"""Forward and backward of one process, whatever the layout: the loop hands over a global batch and gets its loss.

Every process is given the whole global batch and takes its rows and its part of each sequence from it. The loss is
divided by the labels of the whole batch before backward, so that gradients are added up and never averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip.chips.operators import Operators, reference
from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.model.decoder import Decoder
from anychip.model.rope import Rotary, rotary, rotary_at
from anychip.parallel.context import split_positions, take_part
from anychip.parallel.data import sum_copies
from anychip.parallel.parts import allocate, build_parts, named_parameters
from anychip.parallel.pipeline import Pipeline
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import gather_sequence, local, sum_replicated_gradients
from anychip.train.job import TrainingJob
from anychip.train.loss import head_cross_entropy
from anychip.train.recompute import apply_recompute

Watch = Callable[[int], AbstractContextManager[object]]


class Engine:
    """This process's part of the model, and how a batch passes through it."""

    def __init__(
        self,
        job: TrainingJob,
        processes: Processes,
        dtype: torch.dtype,
        operators: Operators = reference,
        give_memory: Callable[[Decoder, torch.device], None] = allocate,
    ) -> None:
        self._job, self._processes, self._operators = job, processes, operators
        self._rows = processes.rows(job.global_batch_size, job.micro_batch_size, job.seq_length)
        self._labels_in_batch, self._all_labelled = 1, False

        def prepare(part: Decoder) -> None:
            apply_recompute(part, job.recompute)
            if job.compile:
                for layer in part.layers:
                    layer.compile(dynamic=False)

        self.parts = build_parts(job.model, processes, dtype, operators, prepare, give_memory)
        self.parameters = named_parameters(self.parts)
        self._pipeline = self._build_pipeline(dtype) if processes.layout.pipeline > 1 else None

    @property
    def arithmetic(self) -> str:
        """What decides the order of sums, in words: the same words mean the same bits."""
        layout, threads = self._processes.layout.describe(), torch.get_num_threads()
        return f"{layout}, micro-batches of {self._job.micro_batch_size}, {threads} threads a process"

    @property
    def pipelined(self) -> bool:
        return self._pipeline is not None

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step here: one a micro-batch; a pipeline's schedule is one for all."""
        return 1 if self._pipeline is not None else len(self._rows) // self._job.micro_batch_size

    def forward_backward(self, batch: Batch, watch: Watch = nullcontext) -> Tensor:
        """Leave the gradients of the mean loss over all labels of the global batch; returns that mean (nats a token,
        a scalar), the same on all processes. `watch` of a pass's number is entered around that pass."""
        total = self._run_passes(batch, self._rows, watch)
        self._sum_gradients()
        return self._sum_losses(total)

    def repeat_pass(self, batch: Batch, reader: int, number: int) -> None:
        """One pass of a reader's step, this one's or another's, here. Its gradients are not summed over copies."""
        share, mine = len(self._rows), self._processes.layout.reader(self._processes.rank)
        size = share // self.passes
        start = self._rows.start + (reader - mine) * share + number * size
        self._run_passes(batch, range(start, start + size))

    def _run_passes(self, batch: Batch, rows: range, watch: Watch = nullcontext) -> Tensor:
        """Gradients and summed loss of some rows of a global batch."""
        self._labels_in_batch = batch.num_labels
        part = self._my_part(batch, rows)
        self._all_labelled = self._labels_in_batch == len(batch.labels) * self._padded_length(batch.labels.shape[1])
        if self._pipeline is not None:
            with watch(0):
                return self._pipeline.forward_backward(part.input_ids, part.labels, self._rotary(part), part.documents)
        total = torch.zeros((), device=self._processes.device)
        for number, start in enumerate(range(0, len(rows), self._job.micro_batch_size)):
            here = slice(start, start + self._job.micro_batch_size)
            documents = None if part.documents is None else part.documents[here]
            with watch(number):
                hidden = self.parts[0](part.input_ids[here], documents=documents, **self._places(part))
                loss = self._loss(hidden, part.labels[here])
                loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def score(self, batch: Batch) -> float:
        """Summed loss (nats) of all rows of a held-out batch, the same on all processes."""
        self._labels_in_batch, self._all_labelled = 1, False
        part = self._my_part(batch, range(len(batch.input_ids)))
        if self._pipeline is not None:
            total = self._pipeline.score(part.input_ids, part.labels, self._rotary(part), part.documents)
        else:
            hidden = self.parts[0](part.input_ids, documents=part.documents, **self._places(part))
            total = self._loss(hidden, part.labels)
        return float(self._sum_losses(total)) / self._processes.layout.readers

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        mesh = self._processes.mesh("tensor")
        hidden = gather_sequence(hidden, mesh)
        weight = local(self.parts[-1].lm_head.weight)
        group = None if mesh is None else mesh.get_group()
        loss = head_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            labels.flatten(),
            self._job.loss_chunk_tokens,
            group,
            all_labelled=self._all_labelled,
            cross_entropy=self._operators.cross_entropy,
        )
        return loss / self._labels_in_batch

    def _sum_gradients(self) -> None:
        if (mesh := self._processes.mesh("tensor")) is not None:
            sum_replicated_gradients(self.parameters.values(), mesh)
        sum_copies(self.parameters.values(), self._processes)

    def _sum_losses(self, mine: Tensor) -> Tensor:
        """Processes that share matrices all have the same loss: one of them counts."""
        counts = self._processes.place.tensor == 0
        return self._processes.sum(mine.clone() if counts else torch.zeros_like(mine))

    def _my_part(self, batch: Batch, rows: range) -> Batch:
        """These rows on this process's device, padded at the end to a length that the layout divides."""
        layout, length = self._processes.layout, batch.input_ids.shape[1]
        wanted = self._padded_length(length)
        part, contexts = slice(rows.start, rows.stop), layout.context

        def mine(x: Tensor, filler: int) -> Tensor:
            padded = F.pad(x[part], (0, wanted - length), value=filler)
            return take_part(padded, contexts, self._processes.place.context).to(self._processes.device)

        documents = None if batch.documents is None else mine(batch.documents, -1)
        return Batch(mine(batch.input_ids, 0), mine(batch.labels, IGNORE_LABEL), documents)

    def _padded_length(self, length: int) -> int:
        """The next length that the layout divides; a pipeline passes one shape only."""
        layout = self._processes.layout
        parts = layout.sequence_parts
        return self._job.seq_length if layout.pipeline > 1 else -(-length // parts) * parts

    def _places(self, part: Batch) -> dict[str, Any]:
        """Where this process's tokens stand in the whole sequence, and how long that is."""
        contexts, place = self._processes.layout.context, self._processes.place.context
        if contexts == 1:
            return {}
        length = contexts * part.input_ids.shape[1]
        return {"positions": split_positions(length, contexts, place).to(self._processes.device), "length": length}

    def _rotary(self, part: Batch) -> Rotary:
        length, places = part.input_ids.shape[1], self._places(part)
        if places:
            return rotary_at(self._job.model, places["positions"], places["length"])
        return rotary(self._job.model, 0, length, length, self._processes.device)

    def _build_pipeline(self, dtype: torch.dtype) -> Pipeline:
        job, layout = self._job, self._processes.layout
        seq = job.seq_length // layout.context
        return Pipeline(
            self._processes,
            self.parts,
            num_micro_batches=len(self._rows) // job.micro_batch_size,
            shape_in=(job.micro_batch_size, seq),
            shape_between=(job.micro_batch_size, seq // layout.tensor, job.model.hidden_size),
            dtype=dtype,
            loss=self._loss,
        )
