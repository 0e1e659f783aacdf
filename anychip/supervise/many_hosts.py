"""`anychip supervise` on one of many hosts: this host's agent, the coordinator, or both."""

from __future__ import annotations

import ipaddress
import json
import platform
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from anychip.chips.environment import boot_id
from anychip.errors import AnychipError, InputError
from anychip.files import write_json
from anychip.launch.sockets import interface_address
from anychip.recipe import Recipe
from anychip.rundir import RunDirectory
from anychip.supervise.agent import Agent, Host
from anychip.supervise.channel import read_token
from anychip.supervise.coordinating import CoordinatorProcess
from anychip.supervise.coordinator import Hosts, Terms, job_id
from anychip.supervise.decide import Policy
from anychip.supervise.lock import only_supervisor
from anychip.supervise.processes import train_command
from anychip.supervise.run import Limits, Supervisor, check_layout, is_possible, stop_signals
from anychip.supervise.wire import Client, Server
from anychip.train.output import where_there_is_room

_HIGHEST_PORT = 65535


@dataclass(frozen=True)
class Place:
    """Where the coordinator is, and what this host listens on."""

    coordinator: tuple[str, int]
    token_file: Path
    interface: str | None = None
    bind: str | None = None
    name: str | None = None


class RememberingPolicy(Policy):
    """One that a coordinator started again on this host goes on with: which hosts failed, and when since its boot."""

    def __init__(self, run: RunDirectory, budget: int) -> None:
        super().__init__(budget)
        self._path, self._boot = run.root / "strikes.json", boot_id()
        with suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError
        ):  # nothing that makes sense: nobody failed
            known = json.loads(self._path.read_bytes())
            if known["boot"] == self._boot:
                self._strikes.update(
                    {str(unit): [float(at) for at in times] for unit, times in known["strikes"].items()}
                )

    def after(self, kind: str, unit: str, step: int, now: float) -> str:
        """`now` is on time.monotonic, which all processes since a boot share."""
        action = super().after(kind, unit, step, now)
        with where_there_is_room(self._path.name):
            write_json(self._path, {"boot": self._boot, "strikes": dict(self._strikes)})
        return action


def coordinate(recipe: Recipe, run: RunDirectory, place: Place, terms: Terms, limits: Limits) -> None:
    """Be the coordinator until the run is over. Raises RunFailed when it failed, InputError for what cannot work."""
    token, job = read_token(place.token_file), job_id(recipe, run)
    address, port = own_address(place), place.coordinator[1]
    with only_supervisor(run), stop_signals() as stop:
        try:
            server = Server(address, port, token)
        except OSError as error:
            raise InputError(f"cannot be listened on ({error.strerror}).", where=f"{address}:{port}") from None
        hosts = Hosts(recipe, run, server, token, job, terms, stop)
        code, text = 1, "The coordinator failed."
        try:
            Supervisor(run, hosts, limits, stop, RememberingPolicy(run, limits.restarts)).run()
            code, text = 0, ""
        except AnychipError as error:
            code, text = error.exit_code, str(error)
            raise
        finally:
            hosts.dismiss(code, text)
            server.close()


def serve_host(
    recipe: Recipe,
    run: RunDirectory,
    arguments: Sequence[str],
    options: Sequence[str],
    processes: int,
    place: Place,
    terms: Terms,
) -> None:
    """Be this host's agent until the run is over, and keep a coordinator alive if this host is the coordinator's.
    `arguments` are those of `anychip train`, `options` those that make `anychip supervise` a coordinator.

    Raises RunFailed when the run failed, InputError for what cannot work.
    """
    _check_some_size(recipe, processes, terms)
    token, address = read_token(place.token_file), own_address(place)
    host = Host(place.name or platform.node(), address, processes, place.interface)
    name, port = place.coordinator
    coordinator, client = None, Client(name, port, token, bind=address)
    if _is_own(name, address):
        coordinator = CoordinatorProcess(address, port, [*options, "--bind", address])
        client = Client(address, port, token, bind=address)
    job = job_id(recipe, run)
    print(f"{host.name} ({address}) takes part with {processes} processes", file=sys.stderr, flush=True)
    with stop_signals() as stop:
        if coordinator is not None:
            coordinator.keep_alive(is_there=False)
        import torch.distributed  # noqa: F401  # for stores; it takes seconds, in which no lease could be kept

        Agent(host, run, train_command(arguments), client, job, stop, coordinator, terms.patience_seconds).run()


def _is_own(host: str, address: str) -> bool:
    """Whether a host is this one. Some systems give their own name a loopback address."""
    found = _address_of(host)
    return found == address or (found != host != "localhost" and ipaddress.ip_address(found).is_loopback)


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:  # UnicodeError: a label that is too long
        why = getattr(error, "strerror", None) or error
        do = "Look at its spelling, at DNS and /etc/hosts, or give an address."
        raise InputError(f"the coordinator's host name cannot be resolved ({why}).", where=host, do=do) from None


def own_address(place: Place) -> str:
    """What this host listens on: as told, else that of the interface, else that which it reaches the coordinator by.
    Raises InputError when it is none of this host's."""
    if place.bind is not None:
        _check_own(place.bind)
        return place.bind
    if place.interface is not None:
        try:
            return interface_address(place.interface)
        except ValueError as error:
            raise InputError(str(error), where="--interface") from None
    name, port = place.coordinator
    found = _address_of(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((found, port))  # sends nothing
        except OSError as error:
            do = "Name this host's interface with --interface."
            raise InputError(f"there is no way to it from here ({error.strerror}).", where=name, do=do) from None
        return str(probe.getsockname()[0])


def _check_own(address: str) -> None:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            do = "Give an address of this host (`ip address` lists them), or --interface."
            raise InputError(f"{address} cannot be listened on here ({why}).", where="--bind", do=do) from None


def parse_nodes(text: str) -> tuple[int, int]:
    """MIN:MAX, or one number for both."""
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise InputError(f"{text!r} is not MIN:MAX.", where="--nodes", do="Give numbers of hosts, such as 3:4.")
    return found


def parse_place(text: str) -> tuple[str, int]:
    """HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= _HIGHEST_PORT:
        raise InputError(f"{text!r} is not HOST:PORT.", where="--coordinator")
    return host, int(port)


def _check_some_size(recipe: Recipe, processes: int, terms: Terms) -> None:
    """Refuse what no number of such hosts could run."""
    if not any(is_possible(recipe, hosts * processes) for hosts in range(terms.least, terms.most + 1)):
        check_layout(recipe, terms.most * processes)
