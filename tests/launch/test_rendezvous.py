"""Where agents meet: a store on one address, under an id of this start."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from anychip.launch.rendezvous import create
from anychip.launch.sockets import interface_address, listen


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parameters(port: int, rank: int, host: str = "127.0.0.2", nodes: int = 2, **conf: Any) -> RendezvousParameters:
    return RendezvousParameters(
        "anychip", f"{host}:{port}", "job-1", nodes, nodes, None, rank=str(rank), timeout="20", **conf
    )


def accepts(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def meet(*each: RendezvousParameters) -> list[Any]:
    """All nodes of a job, one thread each; returns what each is told."""
    told: dict[int, Any] = {}

    def node(number: int) -> None:
        handler = create(each[number])
        told[number] = (handler, handler.next_rendezvous())

    threads = [threading.Thread(target=node, args=(number,), daemon=True) for number in range(len(each))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [told[number] for number in range(len(each))]


def test_the_store_listens_on_the_named_address_alone() -> None:
    port = free_port()
    (_, first), (_, second) = meet(parameters(port, 0), parameters(port, 1))
    assert accepts("127.0.0.2", port) and not accepts("127.0.0.1", port) and not accepts("127.0.0.3", port)
    assert (first.rank, second.rank, first.world_size) == (0, 1, 2)
    first.store.set("greeting", "hello")
    assert second.store.get("greeting") == b"hello"
    assert second.bootstrap_store_info.master_addr == "127.0.0.2" and second.bootstrap_store_info.master_port == port


def test_a_named_interface_decides_the_address() -> None:
    port = free_port()
    held = meet(*(parameters(port, rank, host="127.0.0.1", interface="lo") for rank in (0, 1)))
    assert accepts("127.0.0.1", port) and not accepts("127.0.0.2", port)
    assert interface_address("lo") == held[0][1].bootstrap_store_info.master_addr == "127.0.0.1"


def test_an_address_to_bind_serves_nodes_that_know_another_name() -> None:
    """As behind a Kubernetes Service: node 0 listens on the Pod's address and tells its own processes that one."""
    port = free_port()
    (_, first), (_, second) = meet(
        parameters(port, 0, host="no-such-host.invalid", bind="127.0.0.4"), parameters(port, 1, host="127.0.0.4")
    )
    assert first.bootstrap_store_info.master_addr == "127.0.0.4" == second.bootstrap_store_info.master_addr


def test_keys_of_another_start_are_not_seen() -> None:
    port = free_port()
    (_, first), (handler, _) = meet(parameters(port, 0), parameters(port, 1))
    first.store.set("from", "job-1")
    stale = create(RendezvousParameters("anychip", f"127.0.0.2:{port}", "job-0", 2, 2, None, rank="1", timeout="5"))
    assert handler.get_run_id() == "job-1" and stale.get_run_id() == "job-0"
    late = stale.next_rendezvous().store
    late.set_timeout(timedelta(milliseconds=200))
    assert not late.check(["from"]) and first.store.check(["from"])


def test_attempts_of_one_start_share_no_key() -> None:
    port = free_port()
    nodes = meet(parameters(port, 0), parameters(port, 1))
    first = [info for _, info in nodes]
    first[0].store.set("place", "of the first attempt")
    again: dict[int, Any] = {}

    def node(number: int) -> None:
        again[number] = nodes[number][0].next_rendezvous()

    threads = [threading.Thread(target=node, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    ports = {again[number].bootstrap_store_info.master_port for number in range(2)}
    assert len(ports) == 1 and port not in ports
    assert not again[1].store.check(["place"])
    processes = TCPStore("127.0.0.2", ports.pop(), is_master=False, timeout=timedelta(seconds=5))
    assert processes.num_keys() <= 1  # a store of its own, for what processes write without a prefix
    assert (again[0].rank, again[1].rank, again[1].world_size) == (0, 1, 2)


def test_torchrun_finds_it_by_name() -> None:
    assert get_rendezvous_handler(parameters(free_port(), 0)).get_backend() == "anychip"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "rank=N with N below 2"),
        ({"rank": 0, "interface": "nosuch0"}, "interface nosuch0 has no IPv4 address .*; here are: .*lo"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(parameters(free_port(), **changes))


def test_a_name_that_means_this_machine_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: found)
    with pytest.raises(ValueError, match=r"node7 is 127.0.1.1 on this machine.*launch.network_interface"):
        create(parameters(free_port(), 0, host="node7"))
    assert create(parameters(free_port(), 0, host="node7", nodes=1)).get_run_id() == "job-1"


def test_a_port_in_use_is_said_at_once() -> None:
    port = free_port()
    with listen("127.0.0.2", port), pytest.raises(OSError, match="in use"):
        create(parameters(port, 0)).next_rendezvous()
