"""Bugs of the kinds that training programs were seen to have, put into a process from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from anychip.model import decoder as decoder_module
from anychip.model import rope
from anychip.parallel import gradients
from anychip.train import optimizer as optimizer_module
from anychip.train.engine import Engine
from anychip.train.optimizer import Optimizer

LAYER = 3  # where bugs of a single layer are


def _in_layer(attribute: str, change: Any) -> None:
    """Replace a method of one layer's sub-module when decoders are built."""
    original = decoder_module.DecoderLayer.__init__

    def init(self: Any, config: Any, layer: int, *args: Any) -> None:
        original(self, config, layer, *args)
        if layer == LAYER:
            owner, _, name = attribute.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, name, change(getattr(module, name), module))

    decoder_module.DecoderLayer.__init__ = init  # type: ignore[method-assign]


def wrong_loss_scale() -> None:
    """The loss is divided by fifteen sixteenths of the labels."""
    original = Engine.__init__

    def init(self: Any, job: Any, *args: Any, **keywords: Any) -> None:
        original(self, replace(job, objective=_Scaled(job.objective)), *args, **keywords)

    Engine.__init__ = init  # type: ignore[method-assign]


class _Scaled:
    by_token = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def size(self, batch: Any) -> int:
        return self._inner.size(batch) * 15 // 16

    def complete(self, batch: Any) -> Any:
        return self._inner.complete(batch)

    def loss(self, *args: Any) -> Any:
        return self._inner.loss(*args)


def missing_gradient_sync() -> None:
    """Copies of the model keep their own gradients."""
    Engine._sum_gradients = lambda self: None  # type: ignore[method-assign]


def wrong_rope_base() -> None:
    rope._base = lambda config, alpha: 500_000.0  # type: ignore[assignment]


def stale_keys() -> None:
    """One layer attends to the keys and values of the call before."""

    def change(attend: Any, module: Any) -> Any:
        kept: list[Any] = []

        def run(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
            kept.append((k, v))
            k, v = (x.detach() for x in kept.pop(0)) if len(kept) > 1 else (k, v)
            return attend(q, k, v, **keywords)

        return run

    _in_layer("self_attn.attend", change)


def off_by_one_mask() -> None:
    """A query of one layer sees the token behind it."""

    def change(attend: Any, module: Any) -> Any:
        def run(q: Any, k: Any, v: Any, *, scale: float, causal: bool, mask: Any) -> Any:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
            return attend(q, k, v, scale=scale, causal=False, mask=seen)

        return run

    _in_layer("self_attn.attend", change)


def wrong_epsilon() -> None:
    """1e-3 instead of 1e-5 in one norm."""

    def change(eps: float, module: Any) -> float:
        return 1e-3

    _in_layer("post_attention_layernorm.eps", change)


def missing_bias() -> None:
    """One projection's bias is not added. Biases start at zero, so that backward shows it first."""

    def change(forward: Any, module: Any) -> Any:
        return lambda x, remake=None: F.linear(x, module.weight.to(x.dtype))

    _in_layer("self_attn.o_proj.forward", change)


def wrong_norm_placement() -> None:
    """One layer adds the residual after the norm, not before it."""

    def forward(self: Any, x: Any, cos: Any, sin: Any, scale: float, cache: Any, mask: Any, keys: Any) -> Any:
        normed = self.input_layernorm(x)
        x = normed + self.self_attn(normed, cos, sin, scale, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))

    _in_layer("forward", lambda original, module: forward.__get__(module))


def transposed_heads() -> None:
    """Heads and head size change places in one layer's mixed values."""

    def change(attend: Any, module: Any) -> Any:
        def run(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
            mixed = attend(q, k, v, **keywords)
            b, n, s, d = mixed.shape
            return mixed.transpose(1, 2).reshape(b, s, d, n).transpose(2, 3).transpose(1, 2)

        return run

    _in_layer("self_attn.attend", change)


def dropped_micro_batch() -> None:
    """The last micro-batch of a step is left out."""
    original = Engine._run_passes

    def run(self: Any, batch: Any, rows: range, *args: Any) -> Any:
        return original(self, batch, range(rows.start, rows.stop - self._job.micro_batch_size), *args)

    Engine._run_passes = run  # type: ignore[method-assign]


def wrong_weight_decay() -> None:
    """0.01 instead of 0.1."""
    original = Optimizer._adamw

    def adamw(self: Any, names: Any, lr: float, weight_decay: float) -> None:
        original(self, names, lr, weight_decay / 10)

    Optimizer._adamw = adamw  # type: ignore[method-assign]


def wrong_clipping() -> None:
    """Gradients are clipped to twice the norm."""
    import traced_runs

    original = gradients.scale_gradients
    traced_runs.scale_gradients = lambda parameters, norm, largest: original(parameters, norm, 2 * largest)


def wrong_betas() -> None:
    """The second moment forgets ten times faster."""
    original = Optimizer.__init__

    def init(self: Any, parameters: Any, config: Any, *args: Any) -> None:
        original(self, parameters, config.model_copy(update={"betas": (0.9, 0.5)}), *args)

    optimizer_module.Optimizer.__init__ = init  # type: ignore[method-assign]


def detached_gate() -> None:
    """The gradient of one layer's gate does not flow."""

    def change(swiglu: Any, module: Any) -> Any:
        return lambda gate, up: swiglu(gate.detach() + 0 * gate, up)

    _in_layer("mlp.swiglu", change)


def halved_value_gradient() -> None:
    """One layer's values get half their gradient."""

    def change(attend: Any, module: Any) -> Any:
        return lambda q, k, v, **keywords: attend(q, k, v / 2 + (v / 2).detach(), **keywords)

    _in_layer("self_attn.attend", change)


def wrong_initialization() -> None:
    """One matrix starts 1 % too large."""
    import layout_runs

    original = layout_runs.initialize_parts

    def initialize(parameters: Any, *args: Any) -> None:
        original(parameters, *args)
        parameters[f"layers.{LAYER}.mlp.up_proj.weight"].data.mul_(1.01)

    layout_runs.initialize_parts = initialize


def wrong_gradient_scale_of_embedding() -> None:
    """The table's gradient is counted twice."""
    original = decoder_module.Decoder.embed

    def embed(self: Any, input_ids: Any) -> Any:
        out = original(self, input_ids)
        return 2 * out - out.detach()

    decoder_module.Decoder.embed = embed  # type: ignore[method-assign]
