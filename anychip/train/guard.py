"""Judges a step before it changes anything: numbers that are none, and gradients that explode.

PaLM met some twenty spikes, went back a hundred steps and left out the batches that had led to each (arXiv 2204.02311,
section 5.1); OLMo 2 saw the gradient norm rise before the loss did (arXiv 2501.00656). So the norm is judged, against
its own recent median.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from anychip.errors import SuspectError, UnfitError
from anychip.files import as_own_line
from anychip.parallel.tensor import local
from anychip.recipe.schema import GuardConfig
from anychip.train.copies import Difference, Flip
from anychip.train.output import where_there_is_room
from anychip.train.replay import ReplayFault
from anychip.train.sums import SumFault

_FEWEST_NORMS = 8


class GuardState(BaseModel):
    """What a checkpoint keeps of the guard, so that a continued run judges as an uninterrupted one."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    norms: list[float] = Field(default_factory=list, max_length=1 << 20)
    bad_in_a_row: int = Field(0, ge=0)


class Guard:
    """Loss and norm are sums over all processes, the same on each: so is the verdict, without another message."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=config.window)
        self.bad_in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, or "": then its norm joins the history."""
        problem = self.problem(loss, grad_norm)
        self.bad_in_a_row = self.bad_in_a_row + 1 if problem else 0
        if not problem:
            self._norms.append(grad_norm)
        return problem

    def problem(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, or "". Changes nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss is {loss} and grad_norm is {grad_norm}"
        if self._config.explosion and len(self._norms) >= _FEWEST_NORMS:
            usual = median(self._norms)
            if grad_norm > self._config.explosion * usual:
                return f"grad_norm is {grad_norm:.3g}, {grad_norm / usual:.0f} times its median of {usual:.3g}"
        return ""

    def state(self) -> GuardState:
        return GuardState(norms=list(self._norms), bad_in_a_row=self.bad_in_a_row)

    def restore(self, state: GuardState) -> None:
        self._norms = deque(state.norms, maxlen=self._config.window)
        self.bad_in_a_row = state.bad_in_a_row


class BadSteps:
    """What the policy makes of a bad step, and of copies that differ. `log` is a file for one line of JSON each."""

    def __init__(self, config: GuardConfig, log: Path, *, writes: bool) -> None:
        self._config, self._log, self._writes = config, log, writes
        self._rollbacks, self._undecided = 0, 0
        self._strikes: Counter[int] = Counter()

    def react(
        self, step: int, position: int, problem: str, bad_tensor: str, documents: list[str], bad_in_a_row: int
    ) -> Literal["skip", "rollback"]:
        """`step` counts from 1; `position` is the number of its batch. Raises UnfitError when the run is to stop."""
        action = self._config.on_bad_step
        self._rollbacks += action == "rollback"
        stop = action == "stop" or max(bad_in_a_row, self._rollbacks) >= self._config.patience
        if self._writes:
            row = {"batch": position, "bad_tensor": bad_tensor, "documents": documents}
            said = f"{problem}; first bad tensor: {bad_tensor}"
            self._record(step, said, "stop" if stop else action, row)
        if not stop:
            return "rollback" if action == "rollback" else "skip"
        raise UnfitError(
            f"Training stopped: {problem} in step {step}; first bad tensor: {bad_tensor}. The weights and the "
            "optimizer are as they were before this step.",
            do=f"The documents of this step are in logs/{LOG_NAME}. Start again with a lower learning rate, or with "
            "guard.on_bad_step=rollback, which leaves such batches out.",
        )

    def leave_out(self, step: int, position: int, problem: str, documents: list[str]) -> None:
        """Write down a batch that is left out because its data is damaged."""
        self._record(step, problem, "leave_out", {"batch": position, "documents": documents})

    def passed(self, step: int, problem: str) -> None:
        """Write down a problem that was gone when the step was computed again."""
        if self._writes:
            self._record(step, f"{problem}, and not when computed again", "recompute", {})

    def fault(self, step: int, fault: ReplayFault | SumFault | Flip, rank: int) -> Literal["recompute", "reload"]:
        """Write down a fault of a chip and say what it takes: the step again, or the newest checkpoint. Raises
        UnfitError, on all processes, when a rank is suspected too often: on its own a SuspectError, if it is the only
        one."""
        action: Literal["recompute", "reload"] = "reload" if isinstance(fault, Flip) else "recompute"
        for row in fault.rows(rank):
            self._record(step, fault.describe(), action, {**row, "nodes": list(fault.suspects.values())})
        self._strikes.update(fault.suspects.keys())
        (suspect, strikes), *others = self._strikes.most_common()
        if strikes >= self._config.patience:
            alone = not others or others[0][1] < strikes
            raise (SuspectError if alone and rank == suspect else UnfitError)(
                f"Training stopped: {fault.describe()}; rank {suspect} was suspected {strikes} times. The weights and "
                "the optimizer are as they were before this step.",
                do=f"Take the chip out, and run `anychip doctor` on its host; logs/{LOG_NAME} has all cases. If "
                "ranks change, the kernels may not be deterministic: set training.deterministic=true, or "
                "guard.replay_tolerance.",
            )
        return action

    def heal(self, step: int, differences: Sequence[Difference], rank: int) -> bool:
        """Write down what copies differed after `step`; those outvoted are right again. Returns whether some that this
        process holds were not decided: then all processes call `go_back`."""
        for difference in differences:
            if rank == difference.reporter:
                row = {"ranks": list(difference.wrong or difference.holders), "tensor": difference.name}
                self._record(step, difference.describe(), "repair" if difference.wrong else "reload", row)
        return any(not difference.wrong for difference in differences)

    def go_back(self, differences: Sequence[Difference]) -> None:
        """All processes go back to the newest checkpoint, those too that hold none of what was not decided. Raises
        UnfitError, on all of them, when that goes on."""
        self._undecided += 1
        if self._undecided < self._config.patience:
            return
        here = [difference.describe() for difference in differences if not difference.wrong]
        what = here[0] if here else "copies on other ranks differ, and no majority says which is right"
        raise UnfitError(
            f"Training stopped: {what}; times that this was so: {self._undecided}.",
            do=f"Take out one of the chips whose ranks logs/{LOG_NAME} names, and run `anychip doctor` on their hosts.",
        )

    def _record(self, step: int, problem: str, action: str, more: Mapping[str, object]) -> None:
        row = json.dumps({"step": step, "problem": problem, "action": action, **more})
        with where_there_is_room(f"{self._log.name}: {row}"):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            _append(self._log, row.encode() + b"\n")
        if action != "stop":
            print(f"step {step}: {problem}; {_SAID[action]}", flush=True)


def _append(path: Path, line: bytes) -> None:
    """Behind what a full disk left torn. That stays: other processes may have written behind it by now."""
    with path.open("a+b") as handle:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)  # half of what another process writes now would be taken for a torn row
        handle.write(as_own_line(handle, line))


LOG_NAME = "guard.jsonl"
_SAID = {
    "leave_out": "its batch is left out",
    "skip": "the step changes nothing",
    "rollback": "back to the newest checkpoint, and on behind the batches that led here",
    "repair": "its copies replaced it",
    "reload": "back to the newest checkpoint",
    "recompute": "the step was computed again",
}


def first_bad_tensor(parameters: Mapping[str, nn.Parameter]) -> str:
    """The first tensor on this process with a NaN or an infinity, before gradients are dropped."""
    for name, parameter in parameters.items():
        if not torch.isfinite(local(parameter.detach())).all():
            return f"weight {name}"
    for name, parameter in parameters.items():
        if parameter.grad is not None and (bad := int((~torch.isfinite(local(parameter.grad))).sum())):
            return f"gradient of {name} ({bad:,} of {local(parameter.grad).numel():,} elements)"
    return "none in weights or gradients"
