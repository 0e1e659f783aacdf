"""What is left of the copies after a failure: looked for on all hosts, verified where it lies, put together again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from anychip.errors import AnychipError, InputError, UnfitError
from anychip.train.checkpoint import CheckpointInfo
from anychip.train.checkpoint.manifest import Manifest, parse_manifest
from anychip.train.checkpoint.plan import check_fits, plan_load
from anychip.train.checkpoint.ranks import Ranks
from anychip.train.checkpoint.save import reason
from anychip.train.memory.hosts import Hosts
from anychip.train.memory.parts import (
    PartRecord,
    accept_part,
    check_parts,
    copies_in,
    join_records,
    read_records,
    record_name,
    shard_name,
)
from anychip.train.memory.transfer import Transfer, move_files


@dataclass(frozen=True)
class Found:
    """A copy each part of which some host holds, verified."""

    name: str
    manifest: Manifest
    holders: dict[str, list[int]]  # shard file to the hosts that hold it
    record_nbytes: dict[str, int]

    @property
    def step(self) -> int:
        return self.manifest.step


def find_whole_copies(folder: Path, at_least: int, hosts: Hosts, ranks: Ranks) -> Iterator[Found]:
    """Whole copies of step `at_least` or later, newest first. Called by all ranks together, on from each to the next.

    One of which a part is damaged on all hosts that hold it is passed over with a message.
    """
    held = [_summary(path) for path in copies_in(folder)] if hosts.is_leader else []
    for name in _whole(ranks.exchange([summary for summary in held if summary]), at_least):
        found = _verify(folder / name, hosts, ranks)
        if found:
            yield found


def _summary(directory: Path) -> list[Any] | None:
    """A copy's step, name, number of parts, and the parts that are here."""
    records = read_records(directory)
    if not records:
        return None
    return [records[0].step, directory.name, records[0].world_size, [record.rank for record in records]]


def _whole(held: list[list[Any]], at_least: int) -> list[str]:
    """Names of the copies of which all hosts together hold all parts, newest first."""
    parts: dict[tuple[int, str, int], set[int]] = {}
    for summaries in held:
        for step, name, world_size, here in summaries:
            parts.setdefault((step, name, world_size), set()).update(here)
    whole = [(step, name) for (step, name, size), here in parts.items() if len(here) == size and step >= at_least]
    return [name for _, name in sorted(whole, reverse=True)]


def _verify(directory: Path, hosts: Hosts, ranks: Ranks) -> Found | None:
    """Compare every byte of every part with its digest, on every host that holds it, each process its share."""
    records = read_records(directory)
    damage = check_parts(directory, records, hosts.beside.index(ranks.rank), len(hosts.beside))
    told = ranks.gather(
        [[record.model_dump_json() for record in records] if hosts.is_leader else [], list(damage.items())]
    )
    answer: dict[str, Any] = {}
    if ranks.is_coordinator:
        try:
            answer = _joined(told, hosts)
        except UnfitError as error:
            print(f"warning: copy in memory is passed over: {error}", file=sys.stderr, flush=True)
    answer = ranks.broadcast(answer)
    if not answer:
        return None
    manifest = parse_manifest(answer["manifest"].encode(), directory)
    return Found(directory.name, manifest, answer["holders"], answer["record_nbytes"])


def _joined(told: list[Any], hosts: Hosts) -> dict[str, Any]:
    """The manifest of a copy and who holds its parts, from what all ranks found. Raises UnfitError when one lacks."""
    bad = {(hosts.of_rank[rank], part): what for rank, (_, damage) in enumerate(told) for part, what in damage}
    good: dict[int, PartRecord] = {}
    holders: dict[str, list[int]] = {}
    world_size = 0
    for rank, (records, _) in enumerate(told):
        for record in map(PartRecord.model_validate_json, records):
            world_size = record.world_size
            if (hosts.of_rank[rank], record.rank) not in bad:
                good[record.rank] = record
                holders.setdefault(shard_name(record.rank), []).append(hosts.of_rank[rank])
    if len(good) < world_size or not good:
        raise UnfitError("; ".join(bad.values()) or "some of it has gone.", do="An older one is used.")
    return {
        "manifest": join_records(good[rank] for rank in sorted(good)).to_json().decode(),
        "holders": holders,
        "record_nbytes": {shard_name(rank): len(record.to_bytes()) for rank, record in good.items()},
    }


def fetch_missing(
    found: Found,
    folder: Path,
    wanted: Mapping[str, Tensor],
    part: bool,
    hosts: Hosts,
    ranks: Ranks,
    group: dist.ProcessGroup | None,
) -> CheckpointInfo:
    """Bring the files that the processes of each host need, and it lacks, from hosts that hold them.

    See MemoryCopies.fetch. Memory: the files that arrive, and a piece for each that is under way.
    """
    directory = folder / found.name
    needed: list[str] = []
    problem = ""
    try:
        check_fits(found.manifest, wanted, directory, part=part)
        needed = sorted({chunk.file for chunk, _, _ in plan_load(found.manifest, wanted)})
    except AnychipError as error:
        problem = reason(error)
    told = ranks.exchange([problem, needed])
    _raise_first(InputError, [problem for problem, _ in told])
    transfers = _transfers(found, [files for _, files in told], hosts)
    mine = [transfer for transfer in transfers if ranks.rank in (transfer.source, transfer.target)]
    problem = move_files(mine, directory, group)
    try:
        for transfer in [] if problem else mine:
            if transfer.target == ranks.rank and transfer.name.endswith(".json"):
                accept_part(directory, int(transfer.name[5:-5]))
    except (AnychipError, OSError) as error:
        problem = reason(error)
    _raise_first(UnfitError, ranks.exchange(problem))
    return CheckpointInfo(directory, found.manifest)


def _transfers(found: Found, needed: list[list[str]], hosts: Hosts) -> list[Transfer]:
    """Who sends what to whom, spread over the hosts that hold a file and over the processes of both hosts."""
    transfers: list[Transfer] = []
    for host, beside in enumerate(hosts.ranks_on):
        files = sorted({file for rank in beside for file in needed[rank]})
        for number, file in enumerate(file for file in files if host not in found.holders[file]):
            holders = found.holders[file]
            sources = hosts.ranks_on[holders[number % len(holders)]]
            source, target = sources[number % len(sources)], beside[number % len(beside)]
            record, nbytes = record_name(int(file[5:-12])), found.manifest.files[file].nbytes
            transfers.append(Transfer(source, target, file, nbytes, len(transfers)))
            transfers.append(Transfer(source, target, record, found.record_nbytes[file], len(transfers)))
    return transfers


def _raise_first(kind: type[AnychipError], problems: list[str]) -> None:
    problem = next(filter(None, problems), "")
    if problem:
        raise kind(problem)
