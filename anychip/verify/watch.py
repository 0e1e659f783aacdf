"""Looks on while a model's forward and backward passes run, and leaves the model as it was.

Modules are seen by hooks, and the three operators that are no modules by wrapping them. Both are there between `start`
and `stop` only: a step that is not traced runs as if there were no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anychip.recipe.schema import ModelConfig
from anychip.train.engine import Engine
from anychip.verify.names import Activation, Kind, activations

See = Callable[[Kind, Activation, Tensor, int], None]


class Watch:
    """Hands every activation [b, s, c] and its gradient to `see`, with the number of the pass that it is of, counted
    here from 0 to `passes`. Layers must not be compiled: their hooks would not run."""

    def __init__(self, engine: Engine, model: ModelConfig, passes: int, see: See) -> None:
        self._engine, self._passes, self._see = engine, passes, see
        self._names = {activation.name: activation for activation in activations(model)}
        self._undo: list[Callable[[], None]] = []
        self._done: dict[int, int] = {}  # passes of each part
        self._pass: int | None = None  # the one that a part is in
        self._repeating = False

    def start(self) -> None:
        """Before the forward passes of a step."""
        self.stop()
        self._done, self._pass = {}, None
        self._replace(self._engine, "repeat_pass", self._unseen(self._engine.repeat_pass))
        for part in self._engine.parts:
            self._watch(part)

    def stop(self) -> None:
        """When its gradients are there, or the step was given up."""
        while self._undo:
            self._undo.pop()()

    def _watch(self, part: Any) -> None:
        hooks = [part.register_forward_pre_hook(self._enter), part.register_forward_hook(self._leave)]
        for name, activation in self._names.items():
            owner, _, last = name.rpartition(".")
            try:
                module = part.get_submodule(owner if last == "output" else name)
            except AttributeError:  # of another stage, or no module
                continue
            if module is not None:
                hooks.append(module.register_forward_hook(partial(self._hook, activation)))
        self._undo += [hook.remove for hook in hooks]
        for number, layer in part.layers.named_children():
            attention, mlp = f"layers.{number}.self_attn", f"layers.{number}.mlp"
            if attended := self._names.get(f"{attention}.attended"):
                self._replace(layer.self_attn, "rotate", self._rotations(layer.self_attn.rotate, attention))
                self._replace(layer.self_attn, "attend", self._wrapped(layer.self_attn.attend, attended, _heads_last))
            if swiglu := self._names.get(f"{mlp}.swiglu"):
                self._replace(layer.mlp, "swiglu", self._wrapped(layer.mlp.swiglu, swiglu, lambda x: x))

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        own = vars(owner)
        self._undo.append(partial(setattr, owner, name, own[name]) if name in own else partial(delattr, owner, name))
        setattr(owner, name, new)

    def _enter(self, part: Any, inputs: Any) -> None:
        """Only the step's own passes count: what is computed again because it was bad comes after them."""
        if torch.is_grad_enabled() and not self._repeating:
            number = self._done.get(id(part), 0)
            self._done[id(part)] = number + 1
            self._pass = number if number < self._passes else None

    def _leave(self, part: Any, inputs: Any, output: Any) -> None:
        self._pass = None

    def _unseen(self, repeat_pass: Callable[..., None]) -> Callable[..., None]:
        """A pass that is computed again to check it is none of the step's own."""

        def run(*args: Any) -> None:
            self._repeating = True
            try:
                repeat_pass(*args)
            finally:
                self._repeating = False

        return run

    def _hook(self, activation: Activation, module: Any, inputs: Any, output: Tensor) -> None:
        self._note(activation, output, lambda x: x)

    def _wrapped(
        self, operator: Callable[..., Tensor], activation: Activation, shape: Callable[[Tensor], Tensor]
    ) -> Callable[..., Tensor]:
        def run(*args: Any, **keywords: Any) -> Tensor:
            out = operator(*args, **keywords)
            self._note(activation, out, shape)
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
                self._note(self._names[f"{prefix}.rotated_{which}"], out, lambda x: x.flatten(2))
            return out

        return run

    def _note(self, activation: Activation, output: Tensor, shape: Callable[[Tensor], Tensor]) -> None:
        """An output is seen now, and its gradient when backward comes to it. What backward computes again is not inside
        a part's forward pass, and not seen again."""
        if self._pass is None:
            return
        number = self._pass
        self._see("activation", activation, shape(output.detach()), number)
        if output.requires_grad:
            seen: list[None] = []

            def backward(gradient: Tensor) -> None:
                if not seen:
                    seen.append(None)
                    self._see("gradient", activation, shape(gradient.detach()), number)

            output.register_hook(backward)


def _heads_last(mixed: Tensor) -> Tensor:
    """[b, n, s, d] -> [b, s, n * d]"""
    return mixed.transpose(1, 2).flatten(2)
