"""Writing one checkpoint: each rank its own file, then the coordinator's manifest and marker.

Ranks always reach every exchange, whatever went wrong on one of them, so that a full disk on one node is a message
everywhere and a hang nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from anychip.errors import AnychipError, InputError
from anychip.train.checkpoint.directory import CheckpointError, publish, saving_directory, step_name
from anychip.train.checkpoint.manifest import DTYPE_NAMES, Chunk, FileEntry, Manifest, TensorEntry, tensor_name_problem
from anychip.train.checkpoint.plan import Box, SaveParts
from anychip.train.checkpoint.ranks import Ranks
from anychip.train.checkpoint.shard import ShardWriter, header_bytes

_STREAM_HEADER_BYTES = 256 << 10


def write_checkpoint(
    root: Path, step: int, extra: dict[str, Any], parts: SaveParts, tensor: Callable[[Box], Tensor], ranks: Ranks
) -> int:
    """Write and publish; returns the bytes of all ranks. Raises CheckpointError on every rank if any rank failed."""
    with ExitStack() as stack:
        name, problem = on_coordinator(ranks, lambda: stack.enter_context(saving_directory(root, step)).name)
        if problem:
            raise failed(root, step, problem)
        share = _write_share(root / name, parts, tensor, ranks.rank)
        shares = ranks.gather(share)
        nbytes, problem = on_coordinator(ranks, lambda: _publish(root / name, step, extra, parts.every_box, shares))
        if problem:
            raise failed(root, step, problem)
        return int(nbytes)


def on_coordinator(ranks: Ranks, work: Callable[[], Any]) -> tuple[Any, str]:
    """What `work` gives on the coordinator, told to all ranks as JSON; or None, and why it failed there."""
    told: list[Any] = [None, ""]
    if ranks.is_coordinator:
        try:
            told[0] = work()
        except Exception as error:
            told[1] = reason(error)
    value, problem = ranks.broadcast(told)
    return value, problem


def _write_share(directory: Path, parts: SaveParts, tensor: Callable[[Box], Tensor], rank: int) -> dict[str, Any]:
    """Write this rank's file; returns what the coordinator must know of it, or the problem, as JSON."""
    name = f"rank-{rank:04d}.safetensors"
    share: dict[str, Any] = {"rank": rank, "problem": "", "file": name, "entry": None, "chunks": []}
    if not parts.boxes:
        return share
    try:
        with ShardWriter(directory, name, header_bytes(parts.boxes)) as writer:
            for box in parts.boxes:
                writer.add(box, tensor(box))
            share["entry"] = writer.finish().model_dump()
            share["chunks"] = [[box.name, chunk.model_dump()] for box, chunk in writer.chunks]
    except Exception as error:
        share["problem"] = reason(error)
    return share


def _publish(directory: Path, step: int, extra: dict[str, Any], boxes: list[Box], shares: list[dict[str, Any]]) -> int:
    """Join what the ranks wrote to a manifest that covers every planned tensor, and publish it."""
    problems = [f"rank {share['rank']}: {share['problem']}" for share in shares if share["problem"]]
    if problems:
        raise CheckpointError("; ".join(problems) if len(shares) > 1 else shares[0]["problem"])
    chunks: dict[str, list[Chunk]] = {box.name: [] for box in boxes}
    for share in shares:
        for name, chunk in share["chunks"]:
            chunks[name].append(Chunk.model_validate(chunk))
    kinds = {box.name: (box.dtype, list(box.shape)) for box in boxes}
    manifest = Manifest(
        step=step,
        extra=extra,
        files={share["file"]: FileEntry.model_validate(share["entry"]) for share in shares if share["entry"]},
        tensors={
            name: TensorEntry(
                dtype=dtype, shape=shape, chunks=sorted(chunks[name], key=lambda chunk: tuple(chunk.offsets))
            )
            for name, (dtype, shape) in kinds.items()
        },
    )
    publish(directory, manifest)
    return manifest.nbytes


class TensorStream:
    """Takes whole tensors one at a time; a further file is begun when a header is full."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory, self._stack = directory, stack
        self._writer: ShardWriter | None = None
        self._names: set[str] = set()
        self._files: dict[str, FileEntry] = {}
        self._tensors: dict[str, TensorEntry] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a copy of a dense tensor of any device and strides. Raises CheckpointError when the disk fails."""
        problem = tensor_name_problem(name) or ("was added twice" if name in self._names else "")
        if tensor.dtype not in DTYPE_NAMES:
            problem = f"has dtype {tensor.dtype}, which a checkpoint cannot hold"
        if problem:
            raise InputError(f"tensor {name!r} {problem}.", where=self._directory.parent)
        shape = tuple(tensor.shape)
        box = Box(name, DTYPE_NAMES[tensor.dtype], shape, (0,) * len(shape), shape)
        with disk_errors(self._directory):
            if self._writer is None or not self._writer.has_room(box):
                self._finish_file()
                file = f"rank-0000-{len(self._files):04d}.safetensors"
                self._writer = self._stack.enter_context(ShardWriter(self._directory, file, _STREAM_HEADER_BYTES))
            self._writer.add(box, tensor.detach().clone())
        self._names.add(name)

    def _finish_file(self) -> None:
        if self._writer:
            self._files[self._writer.path.name] = self._writer.finish()
            self._writer.close()
            for box, chunk in self._writer.chunks:
                self._tensors[box.name] = TensorEntry(dtype=box.dtype, shape=list(box.shape), chunks=[chunk])

    def publish(self, step: int, extra: dict[str, Any]) -> None:
        self._finish_file()
        publish(self._directory, Manifest(step=step, extra=extra, files=self._files, tensors=self._tensors))


@contextmanager
def stream_checkpoint(root: Path, step: int, extra: dict[str, Any]) -> Iterator[TensorStream]:
    """Publish when the block ends without an error; otherwise leave nothing."""
    with ExitStack() as stack:
        with disk_errors(root / step_name(step)):
            directory = stack.enter_context(saving_directory(root, step))
        stream = TensorStream(directory, stack)
        yield stream
        with disk_errors(root / step_name(step)):
            stream.publish(step, extra)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"could not be written: {reason(error)}.", where=where, do=_FREE) from error


def failed(root: Path, step: int, problem: str) -> CheckpointError:
    return CheckpointError(f"could not be written: {problem.rstrip('.')}.", where=root / step_name(step), do=_FREE)


def reason(error: Exception) -> str:
    """An error in a user's words."""
    if isinstance(error, AnychipError):
        return f"{error.where}: {error.what}" if error.where else error.what
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or repr(error)


_FREE = "The checkpoints before it are untouched; look at the disk's free space and health."
