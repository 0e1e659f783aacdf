"""Forward and backward of one process, whatever the layout: the loop hands over a global batch and gets its loss.

Every process is given the whole global batch and takes its rows and its part of each sequence from it. The loss is
divided by the size of the whole batch (its labels) before backward, so that gradients are added up, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anychip import alive
from anychip.chips.operators import Operators, reference
from anychip.data.batch import IGNORE_LABEL, Batch
from anychip.errors import InputError
from anychip.model.arithmetic import is_routing_bias
from anychip.model.decoder import Decoder
from anychip.model.dropout import token_keys
from anychip.model.rope import Rotary, rotary, rotary_at
from anychip.parallel.context import split_positions, take_part
from anychip.parallel.data import sum_copies
from anychip.parallel.parts import allocate, build_parts, named_parameters
from anychip.parallel.processes import Processes
from anychip.parallel.tensor import gather_sequence, local, sum_replicated_gradients
from anychip.recipe.schema import ModelConfig
from anychip.train.balance import Balance
from anychip.train.job import TrainingJob
from anychip.train.objective import Head, rows_of
from anychip.train.recompute import apply_recompute

if TYPE_CHECKING:
    from anychip.parallel.pipeline import Pipeline

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
        if job.lora is not None and processes.layout.pipeline > 1:
            raise InputError(
                "adapters (lora) are not trained through a pipeline.",
                do="Set parallel.pipeline_parallel to 1 and split the model by data_parallel_shard or tensor_parallel.",
            )
        self._rows = processes.rows(job.global_batch_size, job.micro_batch_size, job.seq_length)
        self._size, self._all_labelled, self._step = 1, False, 0
        if not job.objective.by_token and (processes.layout.pipeline > 1 or processes.layout.context > 1):
            raise InputError(
                f"{job.title} compares whole sequences, which pipeline and context parallelism take apart.",
                do="Set parallel.pipeline_parallel and parallel.context_parallel to 1.",
            )

        if job.compile:
            torch.use_deterministic_algorithms(job.deterministic)  # tells the compiler too
            prove_attention(job.model, dtype, operators, processes.device)

        def prepare(part: Decoder) -> None:
            apply_recompute(part, job.recompute)
            if job.compile:
                for layer in part.layers:
                    layer.compile(dynamic=False)

        self.parts = build_parts(job.model, processes, dtype, operators, prepare, give_memory, job.lora)
        self.parameters = named_parameters(self.parts)
        self.trainable = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.learned = [p for name, p in self.trainable.items() if not is_routing_bias(name)]
        self.balance = Balance(self.parts, job.model, processes)
        self._pipeline = self._build_pipeline(dtype) if processes.layout.pipeline > 1 else None

    @property
    def processes(self) -> Processes:
        """Those that hold the model together."""
        return self._processes

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

    def begin_step(self, step: int) -> None:
        """What follows is of this step, counted from 1: dropout is drawn for it."""
        self._step = step

    def forward_backward(
        self, batch: Batch, watch: Watch = nullcontext, before_sum: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Leave the gradients of the mean loss of the global batch; returns that mean (a scalar; of next tokens in nats
        a token), the same on all processes. `watch` of a pass's number is entered around that pass; `before_sum` is
        called when this process has made all of its own."""
        total = self._run_passes(batch, self._rows, watch)
        before_sum()
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
        batch = self._job.objective.complete(batch)
        self._size = self._job.objective.size(batch)
        part = replace(self._my_part(batch, rows), keys=self._token_keys(rows, batch.labels.shape[1]))
        self.balance.begin_step(len(batch.labels))
        self._all_labelled = batch.num_labels == len(batch.labels) * self._padded_length(batch.labels.shape[1])
        if self._pipeline is not None:
            with watch(0):
                return self._pipeline.forward_backward(
                    part.input_ids, part.labels, self._rotary(part), part.documents, part.keys
                )
        total = torch.zeros((), device=self._processes.device)
        for number, start in enumerate(range(0, len(rows), self._job.micro_batch_size)):
            micro = rows_of(part, slice(start, start + self._job.micro_batch_size))
            with watch(number):
                hidden = self._hidden(micro)
                loss = self._loss(hidden, micro)
                (loss + self._further_loss(hidden, micro)).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def score(self, batch: Batch) -> float:
        """Summed loss (nats) of all rows of a held-out batch, the same on all processes."""
        batch = self._job.objective.complete(batch)
        self._size, self._all_labelled = 1, False
        part = self._my_part(batch, range(len(batch.input_ids)))
        if self._pipeline is not None:
            total = self._pipeline.score(part.input_ids, part.labels, self._rotary(part), part.documents)
        else:
            total = self._loss(self._hidden(part), part)
        return float(self._sum_losses(total)) / self._processes.layout.readers

    def log_probabilities(self, batch: Batch) -> Tensor:
        """The log-probability of the labels of each row of a global batch, [rows] in fp32 or wider on the CPU, the same
        on all processes. Not through a pipeline, nor with sequences split over contexts."""
        return self._of_rows(batch, Head.log_probabilities, torch.Size([len(batch.labels)]))

    def token_log_probabilities(self, batch: Batch) -> Tensor:
        """As `log_probabilities`, of each label: [rows, seq], 0 where there is none."""
        return self._of_rows(batch, Head.token_log_probabilities, batch.labels.shape)

    @torch.no_grad()
    def _of_rows(self, batch: Batch, read: Callable[[Head, Tensor, Tensor], Tensor], shape: torch.Size) -> Tensor:
        """What `read` makes of the head, hidden states and labels of each row."""
        part, device = self._my_part(batch, self._rows), self._processes.device
        wide = torch.float64 if device.type == "cpu" else torch.float32
        found = torch.zeros(shape, dtype=wide, device=device)
        for start in range(0, len(self._rows), self._job.micro_batch_size):
            micro = rows_of(part, slice(start, start + self._job.micro_batch_size))
            hidden = gather_sequence(self._hidden(micro), self._processes.mesh("tensor"))
            values, here = read(self._head(), hidden, micro.labels), self._rows.start + start
            found[here : here + len(hidden)] = (values[:, : shape[1]] if len(shape) > 1 else values).to(wide)
            alive.progressed()
        return self._sum_losses(found).cpu()

    def _hidden(self, part: Batch) -> Tensor:
        """Final hidden states of rows that are on this device."""
        return self.parts[0](part.input_ids, documents=part.documents, keys=part.keys, **self._places(part))

    def _head(self) -> Head:
        mesh = self._processes.mesh("tensor")
        return Head(
            local(self.parts[-1].head_weight),
            self._job.loss_chunk_tokens,
            None if mesh is None else mesh.get_group(),
            self._operators.cross_entropy,
            self._all_labelled,
        )

    def _loss(self, hidden: Tensor, part: Batch) -> Tensor:
        hidden = gather_sequence(hidden, self._processes.mesh("tensor"))
        return self._job.objective.loss(self._head(), hidden, part) / self._size

    def _further_loss(self, hidden: Tensor, part: Batch) -> Tensor | float:
        """The weighed mean of the losses of further tokens; 0 for a model or an objective without."""
        part_model, depths = self.parts[0], self._job.model.num_nextn_predict_layers
        if not depths or not self._job.objective.by_token:
            return 0.0
        states = part_model.further(hidden, part.input_ids, part.documents, part.keys)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for depth, state in enumerate(states, start=1):
            state = gather_sequence(state, self._processes.mesh("tensor"))
            total = total + self._head().loss(state[:, :-depth], part.labels[:, depth:])
        return total * (self._job.model.mtp_loss_scaling_factor / depths / self._size)

    def _pipeline_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """All that the last stage is given are labels."""
        return self._loss(hidden, Batch(labels, labels))

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

        def known(x: Tensor | None) -> Tensor | None:
            """A number a row, or a number a token."""
            return None if x is None else x[part].to(self._processes.device) if x.dim() == 1 else mine(x, 0)

        return Batch(
            mine(batch.input_ids, 0),
            mine(batch.labels, IGNORE_LABEL),
            None if batch.documents is None else mine(batch.documents, -1),
            *map(known, (batch.reference, batch.sampled, batch.advantages)),
        )

    def _token_keys(self, rows: range, length: int) -> Tensor | None:
        """What dropout in these rows is drawn from, [rows, tokens]: of the tokens whose hidden states lie between
        layers here. A token's key tells its row and position in the whole batch."""
        if not self._job.model.hidden_dropout:
            return None
        assert self._step, "dropout is drawn for a step: begin_step comes first"
        layout, place = self._processes.layout, self._processes.place
        keys = token_keys(self._job.seed, self._step, rows, self._padded_length(length))
        of_context = take_part(keys, layout.context, place.context)
        return of_context.chunk(layout.tensor, 1)[place.tensor].contiguous().to(self._processes.device)

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
        from anychip.parallel.pipeline import Pipeline

        job, layout = self._job, self._processes.layout
        seq = job.seq_length // layout.context
        return Pipeline(
            self._processes,
            self.parts,
            num_micro_batches=len(self._rows) // job.micro_batch_size,
            shape_in=(job.micro_batch_size, seq),
            shape_between=(job.micro_batch_size, seq // layout.tensor, job.model.hidden_size),
            dtype=dtype,
            loss=self._pipeline_loss,
        )


def prove_attention(config: ModelConfig, dtype: torch.dtype, operators: Operators, device: torch.device) -> None:
    """Call attention once as layers will, so that a chip's own version is tried before code that holds it is compiled:
    nothing can be tried while a compiler looks on."""
    queries, keys = (
        torch.zeros(1, heads, _TRIED_TOKENS, config.head_dim, dtype=dtype, device=device)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    operators.attention(queries, keys, keys, scale=1.0, causal=True, mask=None)


_TRIED_TOKENS = 16
