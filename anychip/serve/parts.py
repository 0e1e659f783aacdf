"""One model over several processes: each has some of the heads, experts, of the inner width and of the vocabulary.

The first process leads: it takes requests, chooses tokens, answers. In every step it tells the others what happened to
the slots since the last one and which tokens are read into them; then all compute their parts and add them up. Nobody
else decides anything, so nothing can be decided differently in two places. The split is that of training's
`tensor_parallel` (arXiv 1909.08053), without its split of the sequence: processes that share matrices in training write
answers together in the same way.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from anychip.errors import InputError
from anychip.parallel.collectives import gather
from anychip.recipe.schema import ModelConfig, ParallelConfig
from anychip.serve.slots import Slot, Slots

if TYPE_CHECKING:
    from anychip.parallel.processes import Processes
    from anychip.serve.inference import InferenceModel, Piece

# What a message is made of: a word, and the numbers that belong to it.
_NEW_SLOTS, _RESERVE, _COPY, _CLEAR, _STEP, _END = range(6)
_T = TypeVar("_T")
_IDLE = timedelta(days=3650)  # a server may wait for its next request as long as it likes
_BY_ROWS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")


class Part:
    """The whole model, in one process; others replace what differs."""

    rank, size = 0, 1

    def config(self, config: ModelConfig) -> ModelConfig:
        """The heads that are here."""
        return config

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of what is here of a whole tensor, by its logical name."""
        return tensor

    def rows(self, weight: Tensor) -> Tensor:
        """The outputs that are computed here, of a matrix [out, in]; the experts, of their matrices [e, out, in]."""
        return weight

    def vocabulary(self, weight: Tensor) -> Tensor:
        """The rows of the output head that are here."""
        return weight

    def columns(self, weight: Tensor) -> Tensor:
        """The inputs that are here, of a matrix [out, in]; products with them are summands."""
        return weight

    def once(self, bias: Tensor | None) -> Tensor | None:
        """A bias that belongs to one of the summands."""
        return bias

    def sum(self, x: Tensor) -> Tensor:
        """Everyone's summands added up in fp32, in the dtype of x."""
        return x

    def join(self, x: Tensor) -> Tensor:
        """Everyone's outputs side by side."""
        return x

    def new_slots(
        self, config: ModelConfig, count: int, context_length: int, dtype: torch.dtype, device: torch.device
    ) -> Slots:
        return Slots(config, count, context_length, dtype, device)

    def announce(self, input_ids: Tensor, pieces: Sequence[Piece]) -> None:
        """A step begins."""

    def end(self) -> None:
        """There will be no more steps."""


WHOLE = Part()


class SharedPart(Part):
    """One of several, those of `group`, who make one each. `words` is a group of the same processes for messages in
    host memory. The model is given whole, or as `cut` left it."""

    def __init__(
        self, group: dist.ProcessGroup | None, words: dist.ProcessGroup | None, *, is_cut: bool = False
    ) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._words, self._is_cut = group or dist.group.WORLD, words, is_cut
        self._leader = 0 if group is None else dist.get_global_rank(group, 0)

    def config(self, config: ModelConfig) -> ModelConfig:
        """Raises InputError for sizes that do not divide."""
        for name, size in _shared_sizes(config).items():
            if size % self.size:
                raise InputError(
                    f"{self.size} processes do not divide the model's {name} {size:,}.",
                    where="serve",
                    do="Start as many processes as divide its heads, experts, inner width and vocabulary.",
                )
        return config.model_copy(
            update={
                "num_attention_heads": config.num_attention_heads // self.size,
                "num_key_value_heads": config.num_key_value_heads // self.size,
                "kv_channels": config.head_dim,
            }
        )

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        kind = name.split(".")[-2] if name.endswith(".weight") else ""
        if ".experts." in name or kind in _BY_ROWS:
            return tensor.chunk(self.size, dim=0)[self.rank].clone()
        return tensor.chunk(self.size, dim=1)[self.rank].clone() if kind in _BY_COLUMNS else tensor

    def rows(self, weight: Tensor) -> Tensor:
        return weight if self._is_cut else weight.chunk(self.size, dim=0)[self.rank]

    def vocabulary(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.size, dim=0)[self.rank]

    def columns(self, weight: Tensor) -> Tensor:
        return weight if self._is_cut else weight.chunk(self.size, dim=1)[self.rank]

    def once(self, bias: Tensor | None) -> Tensor | None:
        return bias if self.rank == 0 else None

    def sum(self, x: Tensor) -> Tensor:
        wide = x.float()
        dist.all_reduce(wide, op=dist.ReduceOp.SUM, group=self._group)
        return wide.to(x.dtype)

    def join(self, x: Tensor) -> Tensor:
        assert self._group is not None
        return gather(x, 1, self._group)

    def _send(self, words: list[int]) -> None:
        dist.broadcast(torch.tensor([len(words)]), self._leader, group=self._words)
        dist.broadcast(torch.tensor(words), self._leader, group=self._words)

    def _receive(self) -> Iterator[int]:
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, self._leader, group=self._words)
        words = torch.zeros(int(length), dtype=torch.int64)
        dist.broadcast(words, self._leader, group=self._words)
        return iter(words.tolist())


def _shared_sizes(config: ModelConfig) -> dict[str, int]:
    """What is split, by name."""
    names = ["num_key_value_heads", "num_attention_heads", "vocab_size"]
    if not config.has_experts(0):
        names.append("intermediate_size")
    if config.n_routed_experts:
        names.append("n_routed_experts")
    sizes = {name: getattr(config, name) for name in names}
    if config.n_shared_experts:
        sizes["n_shared_experts x moe_intermediate_size"] = config.n_shared_experts * config.moe_intermediate_size
    return sizes


class LeadingPart(SharedPart):
    """The part of the process that decides. A `server` ends when one of the others is gone, as if told to."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        words: dist.ProcessGroup | None,
        *,
        is_cut: bool = False,
        server: bool = False,
    ) -> None:
        super().__init__(group, words, is_cut=is_cut)
        self._unsaid: list[int] = []
        self._server = server

    def note(self, *words: int) -> None:
        """Something that the others must do before the next step."""
        self._unsaid += words

    def new_slots(
        self, config: ModelConfig, count: int, context_length: int, dtype: torch.dtype, device: torch.device
    ) -> Slots:
        self.note(_NEW_SLOTS, count, context_length)
        return _LeadingSlots(config, count, context_length, dtype, device, self.note)

    def announce(self, input_ids: Tensor, pieces: Sequence[Piece]) -> None:
        self.note(_STEP, len(pieces), len(input_ids))
        for piece in pieces:
            assert isinstance(piece.cache, Slot), "several processes serve from slots"
            self.note(piece.cache.index, piece.cache.length, piece.tokens, piece.sequence_length or 0, piece.every)
        self.note(*input_ids.tolist())
        words, self._unsaid = self._unsaid, []
        self._while_all_live(lambda: self._send(words))

    def sum(self, x: Tensor) -> Tensor:
        return self._while_all_live(lambda: super(LeadingPart, self).sum(x))

    def join(self, x: Tensor) -> Tensor:
        return self._while_all_live(lambda: super(LeadingPart, self).join(x))

    def end(self) -> None:
        self._unsaid = []
        self._send([_END])

    def _while_all_live(self, talk: Callable[[], _T]) -> _T:
        """Without one of the others there is no model."""
        try:
            return talk()
        except RuntimeError:
            if self._server:
                os.kill(os.getpid(), signal.SIGTERM)
            raise


class FollowingPart(SharedPart):
    """The part of a process that does as it is told."""

    def follow(self, model: InferenceModel) -> None:
        """Compute this part of every step until the leader ends. A leader that is gone raises RuntimeError."""
        from anychip.serve.inference import Piece

        slots: Slots | None = None
        while True:
            words = self._receive()
            for word in words:
                if word == _END:
                    return
                if word == _NEW_SLOTS:
                    slots = model.new_slots(next(words), next(words))
                    continue
                assert slots is not None
                if word == _RESERVE:
                    slots.reserve(next(words))
                elif word == _COPY:
                    slots.copy(slots.slots[next(words)], slots.slots[next(words)], next(words))
                elif word == _CLEAR:
                    slots.clear(slots.slots[next(words)])
                else:
                    count, tokens = next(words), next(words)
                    pieces = []
                    for _ in range(count):
                        slot = slots.slots[next(words)]
                        slot.length = next(words)
                        pieces.append(Piece(slot, next(words), next(words) or None, bool(next(words))))
                    model.forward(
                        torch.tensor([next(words) for _ in range(tokens)], device=model.device), pieces, slots
                    )


class _LeadingSlots(Slots):
    """Slots that note what happens to their tensors."""

    def __init__(
        self,
        config: ModelConfig,
        count: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        note: Callable[..., None],
    ) -> None:
        self._note: Callable[..., None] = lambda *words: None  # the first memory is taken by all alike
        super().__init__(config, count, context_length, dtype, device)
        self._note = note

    def reserve(self, capacity: int) -> None:
        if capacity > self.capacity:
            self._note(_RESERVE, capacity)
        super().reserve(capacity)

    def copy(self, source: Slot, target: Slot, tokens: int) -> None:
        self._note(_COPY, source.index, target.index, tokens)
        super().copy(source, target, tokens)

    def clear(self, slot: Slot) -> None:
        self._note(_CLEAR, slot.index)
        super().clear(slot)


def join_parts() -> Part:
    """This process's part of the model in the job that torchrun describes; the whole of it when there is none."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return WHOLE
    from anychip.parallel.processes import Processes

    processes = Processes.join(ParallelConfig(tensor_parallel=world_size), torch.device("cpu"), "gloo")
    words = dist.new_group(backend="gloo", timeout=_IDLE, group_desc="words of the leader")
    return LeadingPart(None, words, server=True) if processes.is_first else FollowingPart(None, words)


def join_training(processes: Processes) -> Part:
    """This process's part of the model that a training job has, among the neighbours it shares matrices with. Called by
    all processes together."""
    size = processes.layout.tensor
    if size == 1:
        return WHOLE
    starts = range(0, processes.layout.world_size, size)
    groups = [dist.new_group(list(range(start, start + size)), backend="gloo") for start in starts]
    words = groups[processes.rank // size]
    kind = FollowingPart if processes.rank % size else LeadingPart
    return kind(processes.group("tensor"), words, is_cut=True)
