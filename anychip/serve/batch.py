"""Continuous batching: requests come and go at any time, and every step serves all that are there.

A step reads one token of each running answer and at most `prefill_tokens` tokens of prompts, first come first served,
so a long prompt delays the answers that are running by that much a step and no more. A prompt starts from what any
slot has in common with it; one that begins like a prompt being read just now waits for it, to take over the beginning.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate

import torch

from anychip.serve.answer import Answer, choose_next
from anychip.serve.inference import InferenceModel
from anychip.serve.request import Event, Request
from anychip.serve.slots import Slot, Slots, common_beginning

_WORTH_WAITING = 32  # tokens of a common beginning


class Batch:
    """The requests of one engine. Not for use from several threads.

    `waiting` requests have no slot yet. Ids must differ among the requests that are here.
    """

    def __init__(self, model: InferenceModel, context_length: int, max_batch: int, prefill_tokens: int) -> None:
        self.model, self.context_length, self.prefill_tokens = model, context_length, prefill_tokens
        self.slots: Slots = model.new_slots(max_batch, context_length)
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Answer] = {}

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Take a request that `Engine.check` has let pass."""
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Drop a request at once, wherever it is; no event follows. Unknown ids are passed over."""
        answer = self.running.pop(request_id, None)
        if answer is not None:
            self._leave(answer)
        else:
            self.waiting = deque(request for request in self.waiting if request.id != request_id)

    def step(self) -> list[Event]:
        """One forward pass over everything that can be read; the events of the answers that got a token or ended."""
        self._admit()
        taken = self._share_out()
        if not taken:
            return []
        ids = torch.tensor([token for one, count in taken for token in one.pending[:count]], device=self.model.device)
        pieces = [one.piece(count) for one, count in taken]
        logits = self.model.forward(ids, pieces, self.slots)
        sizes = [piece.tokens if piece.every else 1 for piece in pieces]
        ready = [one.advance(count, rows) for (one, count), rows in zip(taken, logits.split(sizes), strict=True)]
        last = torch.tensor(list(accumulate(sizes)), device=logits.device) - 1
        choosing = [one for (one, _), can in zip(taken, ready, strict=True) if can]
        if not choosing:
            return []
        events = choose_next(choosing, logits if len(choosing) == len(logits) else logits[last[ready]])
        for one, event in zip(choosing, events, strict=True):
            if event.finish_reason is not None:
                del self.running[one.request.id]
                self._leave(one, damaged=event.finish_reason == "error")
        return events

    def _admit(self) -> None:
        while self.waiting and not self._should_wait(self.waiting[0]):
            request = self.waiting[0]
            prompt = request.prompt
            # Log-probabilities of a prompt need all of it read; equal bits need the same pieces always.
            whole = request.prompt_logprobs
            multiple = len(prompt) if whole else self.prefill_tokens if self.model.invariant else 1
            slot = self.slots.take(prompt, multiple)
            if slot is None:
                return
            self.waiting.popleft()
            self.slots.reserve(min(len(prompt) + request.sampling.max_new_tokens, self.context_length))
            self.running[request.id] = Answer(
                request, slot, slot.tokens, self.context_length, list(prompt[slot.length :]), list(prompt)
            )

    def _should_wait(self, request: Request) -> bool:
        """Whether more of this prompt will be read soon, for another request, than any slot holds now."""
        if request.prompt_logprobs:
            return False
        prompt, limit = request.prompt, len(request.prompt) - 1
        soon = max(
            (common_beginning(one.request.prompt, prompt, limit) for one in self.running.values() if one.in_prompt),
            default=0,
        )
        now = max((common_beginning(slot.tokens, prompt, limit) for slot in self.slots.slots), default=0)
        return soon >= now + _WORTH_WAITING

    def _share_out(self) -> list[tuple[Answer, int]]:
        """Who reads how many tokens in this step: every running answer one, prompts what is left for them."""
        taken = [(one, 1) for one in self.running.values() if not one.in_prompt]
        budget = self.prefill_tokens
        for one in self.running.values():
            if one.in_prompt and budget:
                # In the batch-invariant mode a prompt's pieces are the same whoever is beside it.
                count = min(len(one.pending), self.prefill_tokens if self.model.invariant else budget)
                taken.append((one, count))
                budget = max(0, budget - count)
        return taken

    def _leave(self, answer: Answer, damaged: bool = False) -> None:
        slot = answer.cache
        assert isinstance(slot, Slot)
        if damaged:
            self.slots.clear(slot)
        if self.model.invariant:  # what was read as a prompt, in whole pieces, has the bits that others need
            slot.shared = len(answer.request.prompt) // self.prefill_tokens * self.prefill_tokens
        self.slots.leave(slot)
