"""Which process does what: the degrees of a recipe, checked against the model, the batch and the number of processes.

Processes are numbered with pipeline outermost and tensor innermost: neighbours in a node share matrices, which talk
most, and stages, which talk least, lie farthest apart.

    rank = (((pipeline * replicates + replicate) * shards + shard) * contexts + context) * tensors + tensor
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from anychip.errors import InputError
from anychip.recipe.schema import TWO_STAGE_SCHEDULES, ModelConfig, ParallelConfig

PREFIX_VARIABLE = "ANYCHIP_STORE_PREFIX"  # of the keys under which processes of one start find each other
AXES = ("pipeline", "replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """Degrees in the order of AXES; their product is the number of processes."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def degrees(self) -> tuple[int, ...]:
        return (self.pipeline, self.replicate, self.shard, self.context, self.tensor)

    @property
    def world_size(self) -> int:
        return prod(self.degrees)

    @property
    def readers(self) -> int:
        """Processes that read different rows of a global batch."""
        return self.replicate * self.shard

    @property
    def sequence_parts(self) -> int:
        """Equal pieces that a sequence is cut into: context parallelism gives each process an early and a late one."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)

    def coordinate(self, rank: int) -> Layout:
        """This rank's place on each axis, in the same fields."""
        places = []
        for degree in reversed(self.degrees):
            rank, place = divmod(rank, degree)
            places.append(place)
        return Layout(*reversed(places))

    def reader(self, rank: int) -> int:
        """Which share of the rows this rank reads."""
        place = self.coordinate(rank)
        return place.replicate * self.shard + place.shard

    def describe(self) -> str:
        named = [f"{axis} {degree}" for axis, degree in zip(AXES, self.degrees, strict=True) if degree > 1]
        return " x ".join(named) or "one process"


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """Fill in what the recipe leaves open. Raises InputError when the degrees do not make up `world_size`."""
    layout = Layout(
        config.pipeline_parallel,
        config.copies(world_size),
        config.data_parallel_shard,
        config.context_parallel,
        config.tensor_parallel,
    )
    if layout.world_size != world_size:
        raise InputError(
            f"the recipe's layout ({layout.describe()}) needs {layout.world_size} processes, there are {world_size}.",
            do=f"Start a multiple of {config.processes_a_copy} processes"
            + ("." if config.data_parallel_replicate is None else ", or leave data_parallel_replicate out.")
            + " Degrees are in the recipe's section parallel.",
        )
    return layout


def check_layout(config: ParallelConfig, layout: Layout, model: ModelConfig) -> None:
    """Refuse a layout that this model cannot be cut into, with the nearest legal choices."""
    _divides("tensor_parallel", layout.tensor, "num_key_value_heads", model.num_key_value_heads)
    _divides("tensor_parallel", layout.tensor, "intermediate_size", model.intermediate_size)
    _divides("tensor_parallel", layout.tensor, "vocab_size", model.vocab_size)
    stages = num_stages(config)
    if stages > model.num_hidden_layers and not config.pipeline_layers:
        raise InputError(
            f"{stages} pipeline stages for {model.num_hidden_layers} layers: some would be empty.",
            do=f"Lower pipeline_parallel or virtual_pipeline, to {model.num_hidden_layers} stages at most.",
        )
    if config.virtual_pipeline > 1 and config.pipeline_schedule != "interleaved":
        raise InputError(
            f"virtual_pipeline {config.virtual_pipeline} goes with pipeline_schedule interleaved, not "
            f"{config.pipeline_schedule}.",
            do="Set parallel.pipeline_schedule=interleaved, or parallel.virtual_pipeline=1.",
        )
    if config.pipeline_schedule == "interleaved" and config.virtual_pipeline == 1 and layout.pipeline > 1:
        raise InputError(
            "the interleaved schedule needs more than one stage a process.", do="Set parallel.virtual_pipeline=2."
        )
    if layout.pipeline > 1:
        stage_layers(config, model.num_hidden_layers)
    if config.host_transfers and layout.world_size != layout.pipeline:
        raise InputError(
            f"host_transfers joins pipeline stages of one process each, and the layout is {layout.describe()}.",
            do="Set the other degrees of the section parallel to 1, or host_transfers to false.",
        )
    if layout.pipeline > 1 and (model.tie_word_embeddings or model.num_nextn_predict_layers):
        what = "tied embeddings" if model.tie_word_embeddings else "modules for further tokens (MTP)"
        field = "tie_word_embeddings=false" if model.tie_word_embeddings else "num_nextn_predict_layers=0"
        raise InputError(
            f"{what} need the embedding on the last pipeline stage too, which only the first one holds.",
            do=f"Set parallel.pipeline_parallel=1 or model.{field}.",
        )
    _check_experts(config, layout, model)


def _check_experts(config: ParallelConfig, layout: Layout, model: ModelConfig) -> None:
    experts = config.expert_parallel
    if experts > 1 and not model.n_routed_experts:
        raise InputError("expert_parallel is above 1, and this model has no experts.", do="Set it to 1.")
    if experts > 1:
        _divides("expert_parallel", experts, "n_routed_experts", model.n_routed_experts)
        _divides("expert_parallel", experts, "data_parallel_shard", layout.shard)
    if config.expert_node_size:
        _divides("expert_node_size", config.expert_node_size, "expert_parallel", experts)
        if model.moe_capacity_factor:
            raise InputError(
                "expert_node_size and moe_capacity_factor exclude each other: how full an expert is, is not known "
                "where a token leaves.",
                do="Set parallel.expert_node_size=0 or model.moe_capacity_factor=0.",
            )
    if model.n_routed_experts:
        _divides("tensor_parallel", layout.tensor, "moe_intermediate_size", model.moe_intermediate_size)
    if layout.context > 1 and (model.router_aux_loss_coef or model.num_nextn_predict_layers):
        what = "router_aux_loss_coef" if model.router_aux_loss_coef else "num_nextn_predict_layers"
        raise InputError(
            f"model.{what} looks at whole sequences, which context parallelism takes apart.",
            do=f"Set model.{what}=0 or parallel.context_parallel=1.",
        )


def check_batch(config: ParallelConfig, layout: Layout, seq_length: int, micro_batch: int, global_batch: int) -> None:
    """Refuse a batch that does not divide over the layout, with the nearest legal choices."""
    unit = layout.readers * micro_batch
    if global_batch % unit:
        raise InputError(
            f"global_batch_size {global_batch} does not divide into {layout.readers} readers with micro_batch_size "
            f"{micro_batch}.",
            do=f"Choose {_nearest(global_batch, unit)}.",
        )
    parts = layout.sequence_parts
    if seq_length % parts:
        raise InputError(
            f"seq_length {seq_length} does not divide into {parts} parts (tensor_parallel {layout.tensor}, "
            f"context_parallel {layout.context}, each of whose processes holds two pieces).",
            do=f"Choose {_nearest(seq_length, parts)}.",
        )
    micro_batches = global_batch // unit
    if config.pipeline_schedule == "1f1b" and micro_batches < layout.pipeline:
        raise InputError(
            f"1f1b needs at least as many micro-batches a step as stages ({layout.pipeline}), there are "
            f"{micro_batches}.",
            do=f"Raise global_batch_size to {layout.pipeline * unit}, or lower micro_batch_size.",
        )
    if layout.pipeline > 1 and config.pipeline_schedule == "dualpipe_v" and micro_batches < 2 * layout.pipeline:
        raise InputError(
            f"dualpipe_v needs at least {2 * layout.pipeline} micro-batches a step (two a process), there are "
            f"{micro_batches}.",
            do=f"Raise global_batch_size to {2 * layout.pipeline * unit}, or choose another pipeline_schedule.",
        )
    if layout.pipeline > 1 and config.pipeline_schedule == "interleaved" and micro_batches % layout.pipeline:
        raise InputError(
            f"the interleaved schedule needs a multiple of pipeline_parallel {layout.pipeline} micro-batches, there "
            f"are {micro_batches}.",
            do=f"Choose global_batch_size {_nearest(global_batch, unit * layout.pipeline)}.",
        )


def num_stages(config: ParallelConfig) -> int:
    """Pipeline stages over all processes."""
    per_process = 2 if config.pipeline_schedule in TWO_STAGE_SCHEDULES else config.virtual_pipeline
    return config.pipeline_parallel * (per_process if config.pipeline_parallel > 1 else 1)


def stage_layers(config: ParallelConfig, num_hidden_layers: int) -> list[range]:
    """The layers of each stage, in order. An even split gives what is left over to the middle: the first stage also
    holds the embedding, the last one the head."""
    stages = num_stages(config)
    counts = list(config.pipeline_layers) or _even(num_hidden_layers, stages)
    if len(counts) != stages or sum(counts) != num_hidden_layers:
        raise InputError(
            f"pipeline_layers {counts} gives {len(counts)} stages and {sum(counts)} layers; there are {stages} stages "
            f"(pipeline_parallel x stages a process) and {num_hidden_layers} layers.",
            do=f"An even split is {_even(num_hidden_layers, stages)}.",
        )
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def stages_of(config: ParallelConfig, place: int) -> list[int]:
    """Stages that the process at this place of the pipeline holds, in the order data passes them."""
    stages, size = num_stages(config), config.pipeline_parallel
    if config.pipeline_schedule in TWO_STAGE_SCHEDULES:
        return [place, stages - 1 - place]  # a V: the first process also holds the last stage
    return list(range(place, stages, size))


def _even(layers: int, stages: int) -> list[int]:
    base, left = divmod(layers, stages)
    first = (stages - left) // 2
    return [base + (first <= stage < first + left) for stage in range(stages)]


def _divides(degree_name: str, degree: int, name: str, value: int) -> None:
    if value % degree:
        raise InputError(
            f"{degree_name} {degree} does not divide {name} {value}.",
            do=f"Choose {degree_name} from {_divisors(value, degree)}.",
        )


def _divisors(value: int, near: int) -> str:
    return ", ".join(str(n) for n in range(1, min(value, 2 * near) + 1) if value % n == 0)


def _nearest(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)
