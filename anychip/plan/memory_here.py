"""Bytes of a rank that trains with this software, as a dry run counts them: term by term, when memory is fullest.

What differs from the usual account (`memory`): products read copies of fp32 masters, which FSDP2 gathers layer by layer
or a stage at a time; whole gradients of a pipeline are summed up in fp32 until the stage's last micro-batch; routers
are never cut; a stage has room for all that it receives in a step; the head forms its gradient while the loss is
computed. Several moments are looked at, and the fullest is told: the loss, and the layer whose backward pass begins,
where stages of a process take turns in each of their turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from anychip.plan.ranks import Rank, in_flight
from anychip.plan.shapes import Work, parameters
from anychip.plan.table import DUALPIPE_V, FULL, INTERLEAVED, SELECTIVE, ZERO_BUBBLE, Table, micro_batches
from anychip.plan.types import Floats

TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
MASTER = 4.0  # bytes of a master, a gradient that is summed up, or one of two moments
_AHEAD = (1.0, 2.0)  # stages whose weights are on their way while another works


def fullest_moment(w: Work, t: Table, rank: Rank) -> dict[str, Floats]:
    """Bytes by term, each [n]."""
    turns = np.where(_takes_turns(t), t.vpp, 1.0)
    places = [turns - 1]
    if np.any(turns > 1):
        places += [np.minimum(left, turns - 1) for left in (0.0, 1.0, 2.0)]
    moments = [moment for left in places for moment in _moment(w, t, rank, left)]
    sums = np.stack([np.broadcast_to(np.asarray(sum(moment.values())), (len(t),)) for moment in moments])
    chosen, every = sums.argmax(axis=0), np.arange(len(t))
    return {
        term: np.stack([np.broadcast_to(moment[term], (len(t),)) for moment in moments])[chosen, every]
        for term in TERMS
    }


@dataclass(frozen=True)
class Held:
    """Parameters on one device by who shares them, each [n]."""

    dense: Floats  # FSDP2 cuts them over all shards
    router: Floats  # on every process whole
    experts: Floats  # of this process; FSDP2 cuts them over the groups that hold all experts

    def times(self, count: Floats) -> Held:
        return Held(self.dense * count, self.router * count, self.experts * count)

    def with_ends(self, ends: Floats) -> Held:
        return replace(self, dense=self.dense + ends)

    def bytes(self, each: Floats | float, dense_shards: Floats | float, expert_shards: Floats | float) -> Floats:
        return np.asarray(each * (self.dense / dense_shards + self.router + self.experts / expert_shards))


def _takes_turns(t: Table) -> npt.NDArray[np.bool_]:
    """Whether PyTorch's pipeline runtime gathers and frees the weights of each of a process's stages."""
    many = (t.schedule == INTERLEAVED) | (t.schedule == ZERO_BUBBLE) | (t.schedule == DUALPIPE_V)
    return np.asarray((t.pp > 1) & many)


def _layer_held(w: Work, t: Table, share: Floats) -> Held:
    """One layer, if `share` of the layers have experts."""
    p = parameters(w)
    router = w.experts * (w.hidden + w.ranking_bias)
    whole = p.attention_whole + (1 - share) * p.dense_whole + share * (p.moe_whole - router)
    split = p.attention_split + (1 - share) * p.dense_split + share * p.moe_split
    return Held(split / t.tp + whole, share * router, share * p.expert / t.ep)


def _ends(w: Work, t: Table, rank: Rank) -> tuple[Floats, Floats]:
    """Parameters of the embedding, and of head and last norm, where the rank holds them."""
    p = parameters(w)
    head = rank.last * np.where((w.tied > 0) & (rank.first > 0), 0.0, w.vocab * w.hidden)
    return rank.first * p.embedding / t.tp, head / t.tp + rank.last * p.final_norm


def _all_held(w: Work, t: Table, rank: Rank) -> Held:
    layer, (embedding, head) = _layer_held(w, t, rank.share), _ends(w, t, rank)
    further = _layer_held(w, t, np.minimum(w.experts, 1.0)).times(rank.last * w.extra_layers)
    joined = rank.last * w.extra_layers * _joining(w)
    all_layers = layer.times(rank.layers)
    return Held(
        all_layers.dense + further.dense + embedding + head + joined,
        all_layers.router + further.router,
        all_layers.experts + further.experts,
    )


def _joining(w: Work) -> Floats:
    """Parameters of a module for further tokens beside its layer."""
    return np.asarray(2 * w.hidden**2 + 3 * w.hidden)


def _shards(t: Table) -> tuple[Floats, Floats]:
    """Over how many processes FSDP2 cuts what is dense, and experts."""
    dense = np.where(t.zero >= 1, np.minimum(t.shard, t.dp * t.cp), 1.0)
    return dense, np.maximum(1.0, dense / t.ep)


def _states(w: Work, t: Table, rank: Rank) -> tuple[Floats, Floats]:
    """Masters and moments as (weights, optimizer): masters are weights where products are in fp32 too."""
    held, (dense, experts) = _all_held(w, t, rank), _shards(t)
    master = held.bytes(MASTER, dense, experts)
    moments = held.bytes(2 * MASTER * w.trainable, dense, experts)
    wide = w.element >= 4
    return np.where(wide, master, 0.0), np.where(wide, moments, master + moments)


def _received(w: Work, t: Table, rank: Rank) -> Floats:
    """Room for the hidden states and gradients of all micro-batches of a step, for each stage here."""
    stages = np.where(t.pp > 1, t.vpp, 0.0)
    apart = 2 * stages - rank.first - rank.last
    return np.where(t.pp > 1, apart * micro_batches(w, t) * boundary_bytes(w, t), 0.0)


def boundary_bytes(w: Work, t: Table) -> Floats:
    """Hidden states of one micro-batch between two layers."""
    return np.asarray(w.seq * t.mbs / t.cp / np.where(t.sp > 0, t.tp, 1.0) * w.hidden * w.element)


@dataclass(frozen=True)
class Activations:
    """Bytes of the mean layer of a rank and one micro-batch, each [n]."""

    kept: Floats  # what its forward pass keeps beside its input
    forward: Floats  # what its forward pass has at hand at the end
    swiglu: Floats  # what the backward pass of SwiGLU has at hand


def layer_activations(w: Work, t: Table, rank: Rank) -> Activations:
    """Tensor by tensor, as the plain operators keep them."""
    e, share = w.element, rank.share
    tokens = w.seq * t.mbs / t.cp
    state, part = tokens * w.hidden * e, boundary_bytes(w, t)
    remade = t.recompute == SELECTIVE  # norms and SwiGLU are made again
    plain = tokens * e / t.tp * (2 * w.heads + 2 * w.kv_heads) * w.key_dim
    # Kernels take one width of head, so values are padded; the output is cut again.
    latent = tokens * e * (4 * w.heads * w.key_dim + w.heads * w.value_dim + 2 * w.q_rank + 2 * w.kv_rank + w.rope_dim)
    attention = np.where(w.is_latent > 0, latent, plain) + tokens * 4 * w.heads / t.tp
    inner = tokens * e / t.tp * ((1 - share) * w.ffn + share * w.shared_ffn)
    swiglu = inner * np.where(remade, 2.0, 3.0)
    norms = np.where(remade & (t.tp == 1), 0.0, 2 * state)
    rows = tokens * w.top_k
    router = share * tokens * 4 * (w.hidden + 3 * w.experts)
    routed = share * rows * e * (2 * w.hidden + 3 * w.moe_ffn)
    kept = part + attention + swiglu + norms + router + routed  # `part`: between attention and feed-forward
    nodes = np.where(t.expert_node > 0, t.ep / np.maximum(t.expert_node, 1), 1.0)
    travelled = np.where(nodes > 1, tokens * nodes * (1 - (1 - 1 / nodes) ** w.top_k), tokens)
    # Answers spread over the choices of each token, one column of them in fp32; what was gathered to be sent.
    spread = travelled * w.top_k * w.hidden * e + travelled * w.hidden * 4
    sent = rows * w.hidden * e + np.where(nodes > 1, travelled * w.hidden * e, 0.0)
    # Its gradient and two products of it; what the down projection had kept is gone.
    return Activations(kept, share * (spread + sent), 2 * (inner + share * rows * e * w.moe_ffn))


def _stage_share(w: Work, t: Table, rank: Rank, left: Floats) -> Floats:
    """Of the layers of one stage the share with experts: dense ones lead, so the first of several stages has them."""
    turns = np.where(_takes_turns(t), t.vpp, 1.0)
    each = rank.layers / turns
    dense = rank.layers * (1 - rank.share)
    first = 1 - np.minimum(dense, each) / np.maximum(each, 1e-9)
    others = 1 - np.maximum(0.0, dense - each) / np.maximum(rank.layers - each, 1e-9)
    return np.where(w.experts > 0, np.where(left == 0, first, others), 0.0)


def _stage_held(w: Work, t: Table, rank: Rank, left: Floats) -> Held:
    """The stage with `left` stages of this process still to come in the backward pass."""
    turns = np.where(_takes_turns(t), t.vpp, 1.0)
    embedding, head = _ends(w, t, rank)
    ends = np.where(left == 0, embedding, 0.0) + np.where(left == turns - 1, head, 0.0)
    return _layer_held(w, t, _stage_share(w, t, rank, left)).times(rank.layers / turns).with_ends(ends)


def _moment(w: Work, t: Table, rank: Rank, left: Floats) -> list[dict[str, Floats]]:
    """While a stage works: its last layer is made again, then has its backward pass, early and late; and, in the last
    stage, the loss."""
    turns = np.where(_takes_turns(t), t.vpp, 1.0)
    piped, together = t.pp > 1, _takes_turns(t) & (micro_batches(w, t) <= t.pp)
    dense_shards, expert_shards = _shards(t)
    cut, cut_experts = dense_shards > 1, expert_shards > 1
    everything, here = _all_held(w, t, rank), _stage_held(w, t, rank, left)
    top = np.where(_stage_share(w, t, rank, left) > 1e-6, 1.0, 0.0)  # layers with experts are the fullest
    layer, (embedding, head) = _layer_held(w, t, top), _ends(w, t, rank)
    weights, optimizer = _states(w, t, rank)
    # Weights: of the stage, or of the ends and one layer; where nothing is gathered, one matrix that products read.
    dense = np.where(piped, here.dense, layer.dense + embedding + head)
    gathered = np.where(cut, dense, 0.0) + np.where(cut_experts, np.where(piped, here.experts, layer.experts), 0.0)
    cast = np.where(cut | (w.element >= 4), 0.0, np.maximum(w.ffn, w.heads * w.key_dim) * w.hidden / t.tp)
    # Gradients: cut as soon as a layer is through; in a pipeline whole until a stage has seen its last micro-batch.
    summed = everything.bytes(MASTER, dense_shards, expert_shards)
    whole = np.where(together, here.bytes(MASTER, 1.0, 1.0), everything.bytes(MASTER, 1.0, 1.0))
    later = _stage_held(w, t, rank, np.minimum(1.0, turns - 1)).times(turns - 1 - left)
    later = later.with_ends(
        np.where(left < turns - 1, head, 0.0) - np.where(turns == 2, head * (turns - 1 - left), 0.0)
    )
    done = np.where(together, later.bytes(MASTER, dense_shards, expert_shards), 0.0)
    grads = np.where(piped & cut, done + whole, summed)
    of_head = np.where(cut & (left == turns - 1), w.element * head, 0.0)
    made = w.element * (np.where(cut, layer.dense, 0.0) + np.where(cut_experts, layer.experts, 0.0))
    # Buffers: the next stages' weights on their way, or the next layer's and the last one's gradients.
    stages = [
        np.where(left >= ahead, _stage_held(w, t, rank, left - ahead).bytes(w.element, 1.0, 1.0), 0.0)
        for ahead in _AHEAD
        if np.any(left >= ahead)
    ]
    joined = np.where(w.extra_layers > 0, _joining(w), 0.0)
    recent = left == turns - 1  # the next stages' weights are still there from their forward pass
    coming = np.where(piped & cut, sum(stages), 0.0) if stages else np.zeros(len(t))
    flat = np.where(piped, np.where(recent, 0.0, coming), layer.dense * w.element + (layer.dense + joined) * MASTER)
    waiting = _waiting(w, t, rank, left)
    again, swiglu, backward = _live(w, t, replace(rank, share=top))
    # Further tokens read the embedding too: that part of its gradient waits for the other.
    further = np.where(w.extra_layers > 0, w.element * embedding, 0.0)
    base = {
        "weights": weights + w.element * (gathered + cast) + np.where(recent, coming, 0.0),
        "gradients": (grads + of_head) * w.trainable,
        "optimizer": optimizer,
        "activations": waiting + again + further,
        "logits": np.zeros(len(t)),
        "buffers": _received(w, t, rank) + np.where(cut, flat, 0.0),
    }
    down = np.where(cut, w.element * w.hidden * np.where(top > 0, w.shared_ffn, w.ffn) / t.tp, 0.0)
    second = base | {"gradients": (grads + of_head + down) * w.trainable, "activations": waiting + swiglu + further}
    third = base | {"gradients": (grads + of_head + made) * w.trainable, "activations": waiting + backward + further}
    ends = weights + w.element * np.where(cut, embedding + head, w.vocab * w.hidden / t.tp * (w.element < 4))
    at_loss = {
        "weights": np.where(piped & cut, base["weights"], ends),
        "gradients": grads * w.trainable,
        "activations": waiting,
        "buffers": np.where(piped, base["buffers"], 0.0),
    }
    return [base, second, third, _loss(w, t, rank, base | at_loss, left)]


def _waiting(w: Work, t: Table, rank: Rank, left: Floats) -> Floats:
    """What the layers keep of all micro-batches that wait for their backward pass."""
    m = micro_batches(w, t)
    turns = np.where(_takes_turns(t), t.vpp, 1.0)
    held = in_flight(t, rank.position, m)
    # The fullest backward pass is the second one: gradients are there by then.
    held = np.where(held * turns >= m * turns, np.maximum(m * turns - 1, 1.0) / turns, held)
    rest = np.where(_takes_turns(t) & (m <= t.pp), (left * m + m - 1) / turns, held)
    held = np.minimum(held, np.maximum(rest, 1 / turns))
    partly = np.where(
        t.recompute_layers > 0, np.minimum(1.0, t.recompute_layers * t.vpp / np.maximum(rank.layers, 1)), 1.0
    )
    full = (t.recompute == FULL) * partly
    boundary = boundary_bytes(w, t)
    each = boundary + (1 - full) * layer_activations(w, t, rank).kept
    first = rank.first * np.minimum(m, held * turns) * boundary  # of the embedding
    return np.asarray(held * rank.layers * each + first)


def _live(w: Work, t: Table, rank: Rank) -> tuple[Floats, Floats, Floats]:
    """What the layer at work takes when it has been made again, in the backward pass of SwiGLU, and at the end of its
    own, in attention."""
    layer = layer_activations(w, t, rank)
    tokens = w.seq * t.mbs / t.cp
    backward = 4 * tokens * w.hidden * w.element + 2 * tokens * w.heads * w.key_dim * w.element / t.tp
    again = np.where(t.recompute == FULL, layer.kept, 0.0)
    return np.asarray(again + layer.forward), np.asarray(again + layer.swiglu), np.asarray(backward)


def _loss(w: Work, t: Table, rank: Rank, base: dict[str, Floats], left: Floats) -> dict[str, Floats]:
    """While the head forms its gradient: on the rank and in the stage that hold it."""
    turns = np.where(_takes_turns(t), t.vpp, 1.0)
    tokens = w.seq * t.mbs / t.cp
    chunk = np.where(w.loss_chunk > 0, np.minimum(w.loss_chunk, tokens), tokens)
    rows, narrow = w.vocab / t.tp, w.element
    cut = _shards(t)[0] > 1
    short = np.where(narrow < MASTER, 1.0, 0.0)
    # Of a chunk: logits and the gradient of the chunk before, in fp32 logits and (log-)probabilities, which processes
    # that share the vocabulary first subtract the largest from.
    sums = narrow * (1.0 + (chunk < tokens)) + MASTER * (short + np.where(t.tp > 1, 2.0, 1.0))
    forming = rows * np.maximum(chunk * sums, narrow * (short * w.hidden + 2 * chunk))  # or: products of its gradient
    table = rows * w.hidden * (MASTER + w.extra_layers * np.where(cut, narrow, MASTER))
    logits = forming + (1 + w.extra_layers) * tokens * w.hidden * narrow
    whole = np.where(t.tp > 1, tokens * w.hidden * narrow + boundary_bytes(w, t), 0.0)
    states = (1 + 6 * w.extra_layers) * boundary_bytes(w, t) + whole
    moment = base | {"activations": base["activations"] + states, "logits": table + logits}
    return {term: np.where((rank.last > 0) & (left == turns - 1), value, 0.0) for term, value in moment.items()}
