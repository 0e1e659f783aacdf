"""Where torchrun's agents meet: a store that listens on one address, not on all of them.

torchrun's own rendezvous listens on every interface and serves whoever connects, without any credential. This one is a
`static` rendezvous (every node knows its number; no elections among a thousand nodes) whose store is bound to the named
interface. Two starts of a job never mix: keys carry the rendezvous id, which is new for every start. Nor do attempts of
one start (torchrun's --max-restarts): each has its own keys, and its processes a store of their own.

    torchrun --rdzv-backend=anychip --rdzv-endpoint=HOST:PORT --rdzv-id=ID
             --rdzv-conf=rank=N[,interface=NAME][,bind=ADDRESS][,timeout=SECONDS]

torchrun finds it through entry.py, an entry point of group `torchrun.handlers`.
"""

from __future__ import annotations

import ipaddress
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from anychip.launch.sockets import interface_address, listen


class BoundRendezvous(RendezvousHandler):
    """`rank` is the node's number; node 0 holds the store on `bind`, which the others reach as `host`."""

    def __init__(self, host: str, port: int, rank: int, nodes: int, run_id: str, bind: str, timeout: timedelta) -> None:
        self._host, self._port, self._rank, self._nodes = host, port, rank, nodes
        self._run_id, self._bind, self._timeout = run_id, bind, timeout
        self._store: TCPStore | None = None
        self._attempt = 0
        self._attempts_store: TCPStore | None = None

    def get_backend(self) -> str:
        return "anychip"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Blocks until all nodes are here, or raises when `timeout` has passed. torchrun calls it for every attempt, on
        every node."""
        address = self._bind if self._rank == 0 else self._host
        if self._store is None:
            self._store = self._hold_store(self._port) if self._rank == 0 else self._reach_store()
        keys = PrefixStore(f"{self._run_id}/{self._attempt}", self._store)
        port = self._port if self._attempt == 0 else self._port_of_attempt(keys)
        self._attempt += 1
        return RendezvousInfo(keys, self._rank, self._nodes, RendezvousStoreInfo(address, port))

    def _port_of_attempt(self, keys: PrefixStore) -> int:
        """Processes use the store as it is, without a prefix, and would read what those before them wrote: later
        attempts get a new one, on a port that the system chooses."""
        if self._rank == 0:
            self._attempts_store = self._hold_store(0)
            keys.set("port", str(self._attempts_store.port))
        return int(keys.get("port"))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nodes do not come and go."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True

    def _hold_store(self, port: int) -> TCPStore:
        listener = listen(self._bind, port)
        port = int(listener.getsockname()[1])
        waits = port == self._port  # for all nodes
        return TCPStore(self._bind, port, self._nodes, True, self._timeout, waits, master_listen_fd=listener.detach())

    def _reach_store(self) -> TCPStore:
        return TCPStore(self._host, self._port, self._nodes, False, self._timeout)


def create(parameters: RendezvousParameters) -> BoundRendezvous:
    """What torchrun calls for `--rdzv-backend=anychip`. Raises ValueError for a configuration that cannot work."""
    rank, nodes = parameters.get_as_int("rank"), parameters.max_nodes
    host, port = parse_rendezvous_endpoint(parameters.endpoint.strip(), -1)
    if rank is None or not 0 <= rank < nodes or port < 0:
        raise ValueError(f"--rdzv-conf=rank=N with N below {nodes} and --rdzv-endpoint=HOST:PORT are needed")
    interface, bind = parameters.get("interface"), parameters.get("bind")
    if rank == 0 and bind is None:
        bind = interface_address(interface) if interface else _address_of(host, alone=nodes == 1)
    timeout = timedelta(seconds=parameters.get_as_int("timeout", 900) or 900)
    return BoundRendezvous(host, port, rank, nodes, parameters.run_id, bind or host, timeout)


def _address_of(host: str, *, alone: bool) -> str:
    """A name of this machine as an address. Some systems give their own name a loopback address, which no other node
    can reach: then the interface must be named."""
    address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    is_name = host != address and host != "localhost"
    if is_name and not alone and ipaddress.ip_address(address).is_loopback:
        raise ValueError(
            f"{host} is {address} on this machine, where other nodes cannot reach it: set launch.network_interface in "
            "the cluster file (--rdzv-conf=...,interface=NAME)"
        )
    return address
