"""The processes of a job: this one's place in the layout, and the groups it talks in."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from anychip.chips.backend import detect_backend
from anychip.parallel.layout import AXES, PREFIX_VARIABLE, Layout, check_batch, resolve_layout
from anychip.parallel.messages import telling
from anychip.recipe.schema import ParallelConfig


def group_backends(device: torch.device, collective_backend: str) -> str:
    """What `init_process_group` is told: gloo for host memory, the chip's library for its own."""
    return "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{collective_backend}"


class Processes:
    """One process of a layout. A layout of one process needs no process group.

    Only axes of more than one process have a group, made by DeviceMesh; groups over several axes are made when first
    asked for (by all processes, in the same order).
    """

    def __init__(self, config: ParallelConfig, layout: Layout, rank: int, device: torch.device) -> None:
        self.config, self.layout, self.rank, self.device = config, layout, rank, device
        # Where messages start and end. Chips of different makes have no collective library in common, hosts do.
        self.exchange_device = torch.device("cpu") if config.host_transfers else device
        self.place = layout.coordinate(rank)
        axes = [(axis, degree) for axis, degree in zip(AXES, layout.degrees, strict=True) if degree > 1]
        self._mesh = (
            init_device_mesh(
                self.exchange_device.type, tuple(d for _, d in axes), mesh_dim_names=tuple(a for a, _ in axes)
            )
            if axes
            else None
        )
        self._flat: dict[tuple[str, ...], DeviceMesh] = {}
        self.expert_mesh: DeviceMesh | None = None  # of the processes that share the experts
        self.expert_sharding_mesh: DeviceMesh | None = None  # that FSDP cuts each of their experts over
        self._expert_tensor_mesh: DeviceMesh | None = None  # of those who share experts, by those who share matrices
        self.expert_node_group: dist.ProcessGroup | None = None  # those of `expert_mesh` in this node
        self.expert_across_group: dist.ProcessGroup | None = None  # one of each node
        if config.expert_parallel > 1:
            self._split_shards()

    def _split_shards(self) -> None:
        """A second mesh, in which the shard axis is two: groups that hold all experts, and the experts of a group. Its
        neighbours are the members of a group."""
        layout, experts, node = self.layout, self.config.expert_parallel, self.config.expert_node_size
        node = node if 1 < node < experts else experts
        degrees = {
            "pipeline": layout.pipeline,
            "replicate": layout.replicate,
            "outer": layout.shard // experts,
            "across": experts // node,
            "within": node,
            "context": layout.context,
            "tensor": layout.tensor,
        }
        wide = {axis: degree for axis, degree in degrees.items() if degree > 1}
        mesh = init_device_mesh(self.exchange_device.type, tuple(wide.values()), mesh_dim_names=tuple(wide))

        def over(*axes: str) -> DeviceMesh | None:
            found = tuple(axis for axis in axes if axis in wide)
            if not found:
                return None
            return mesh[found[0]] if len(found) == 1 else mesh[found]._flatten("_".join(found))

        self.expert_mesh = over("across", "within")
        assert self.expert_mesh is not None and self.expert_mesh.mesh_dim_names is not None
        if "tensor" in wide:
            self._expert_tensor_mesh = mesh[self.expert_mesh.mesh_dim_names[0], "tensor"]
        if "across" in wide and "within" in wide:
            self.expert_across_group, self.expert_node_group = mesh["across"].get_group(), mesh["within"].get_group()
        sharing = over("outer", "context")
        if sharing is not None and "replicate" in wide:
            assert sharing.mesh_dim_names is not None
            sharing = mesh["replicate", sharing.mesh_dim_names[0]]
        self.expert_sharding_mesh = sharing

    def experts_mesh(self) -> DeviceMesh | None:
        """Of the processes that hold parts of the experts: of all of them, of each one's matrices, or both."""
        if self.expert_mesh is None:
            return self.mesh("tensor")
        return self._expert_tensor_mesh or self.expert_mesh

    def expert_groups(self) -> dict[str, dist.ProcessGroup]:
        """The groups that only expert parallelism talks in, by what they are."""
        if self.expert_mesh is None:
            return {}
        found = {
            "experts in a node": self.expert_node_group,
            "experts across nodes": self.expert_across_group,
            "experts": self.expert_mesh.get_group(),
        }
        if (sharing := self.expert_sharding_mesh) is not None:
            found |= {
                f"shares of experts ({name})": sharing.get_group(at)
                for at, name in enumerate(sharing.mesh_dim_names or ())
            }
        return {name: group for name, group in found.items() if group is not None}

    @classmethod
    def join(
        cls, config: ParallelConfig, device: torch.device, collective_backend: str, timeout: timedelta | None = None
    ) -> Processes:
        """Join the job that torchrun describes in the environment; a job of one when it describes none."""
        world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        layout = resolve_layout(config, world_size)
        if world_size > 1 and not dist.is_initialized():
            backends = "gloo" if config.host_transfers else group_backends(device, collective_backend)
            prefix = os.environ.get(PREFIX_VARIABLE)
            if prefix is None:
                dist.init_process_group(backends, timeout=timeout)
            else:
                store, _, _ = next(rendezvous("env://", timeout=timeout or default_pg_timeout))
                store = PrefixStore(prefix, store)
                dist.init_process_group(backends, timeout=timeout, store=store, rank=rank, world_size=world_size)
            atexit.register(_leave_groups)
        return cls(config, layout, rank, device)

    @classmethod
    def join_here(cls, config: ParallelConfig) -> Processes:
        """`join` with the chip at hand: this process's device, and its collective library."""
        backend = detect_backend()
        backend.prepare_process()
        return cls.join(config, backend.device(), backend.collective_backend)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mesh(self, *axes: str) -> DeviceMesh | None:
        """The mesh over these axes as one dimension; None when they hold one process."""
        wide = tuple(axis for axis in axes if getattr(self.layout, axis) > 1)
        if not wide or self._mesh is None:
            return None
        if len(wide) == 1:
            return self._mesh[wide[0]]
        if wide not in self._flat:
            self._flat[wide] = self._mesh[wide]._flatten("_".join(wide))
        return self._flat[wide]

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The process group over these axes; None when they hold one process."""
        mesh = self.mesh(*axes)
        return None if mesh is None else mesh.get_group()

    def sharding_mesh(self) -> DeviceMesh | None:
        """What FSDP2 is given: parameters shared over shard x context, copied over replicate. None: not sharded."""
        if self.layout.shard == 1:
            return None
        shared = self.mesh("shard", "context")
        assert shared is not None and self._mesh is not None
        if self.layout.replicate == 1:
            return shared
        assert shared.mesh_dim_names is not None
        return self._mesh["replicate", shared.mesh_dim_names[0]]

    def new_control_group(self) -> dist.ProcessGroup | None:
        """A gloo group of all processes, for one user alone; None for one process."""
        return dist.new_group(backend="gloo", group_desc="saving") if self.layout.world_size > 1 else None

    def rows(self, global_batch_size: int, micro_batch_size: int, seq_length: int) -> range:
        """Rows of the global batch that this process reads."""
        check_batch(self.config, self.layout, seq_length, micro_batch_size, global_batch_size)
        share = global_batch_size // self.layout.readers
        reader = self.layout.reader(self.rank)
        return range(reader * share, (reader + 1) * share)

    def sum(self, value: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.layout.world_size == 1:
            return value
        if not self.config.host_transfers:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
            return value
        sent = value.to(self.exchange_device, torch.float64)  # chips may differ in what they call wide
        dist.all_reduce(sent, op=dist.ReduceOp.SUM)
        return value.copy_(sent)

    def any(self, flag: bool) -> bool:
        """Whether any process says so: all of them get the same answer."""
        if self.layout.world_size == 1:
            return flag
        with telling("all_reduce", "default_pg", 4):  # the wait for the answer is part of it
            return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def barrier(self) -> None:
        if self.layout.world_size > 1:
            self.any(False)


def _leave_groups() -> None:
    """Before the interpreter ends: threads of gloo that still run then abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
