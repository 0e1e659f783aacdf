"""Context parallelism: one sequence split over processes, for contexts that do not fit into one."""

from anychip.parallel.context.apply import apply_context_parallel
from anychip.parallel.context.split import join_parts, split_positions, take_part

__all__ = ["apply_context_parallel", "join_parts", "split_positions", "take_part"]
