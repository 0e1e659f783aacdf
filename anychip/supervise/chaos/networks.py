"""A network of its own for every host, which can be cut off: network namespaces joined by a bridge.

The whole of `anychip chaos` starts itself again inside namespaces of its own, where it may make more of them, and where
every process dies with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

COORDINATOR_PORT = 29400
_INSIDE = "ANYCHIP_CHAOS_INSIDE"
_UNSHARE = (
    *("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid"),
    *("--mount-proc", "--fork", "--kill-child"),
)
_FABRIC = """
set -e
mount -t tmpfs none /run
ip link set lo up
ip link add fabric type bridge
ip link set fabric up
"""
_HOST = """
ip netns add host{number}
ip link add port{number} type veth peer name fabric0 netns host{number}
ip link set port{number} master fabric up
ip -n host{number} address add 10.77.0.{address}/24 dev fabric0
ip -n host{number} link set fabric0 up
ip -n host{number} link set lo up
"""


def is_inside() -> bool:
    return _INSIDE in os.environ


def problem() -> str:
    """Why this machine does not let a user make networks, in words; "" when it does."""
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    script = _FABRIC + _HOST.format(number=0, address=1)
    result = subprocess.run([*_UNSHARE, "sh", "-c", script], capture_output=True, text=True, check=False)
    return (result.stderr.strip() or f"exit code {result.returncode}")[-200:] if result.returncode else ""


def start_again_inside(arguments: Sequence[str]) -> None:
    """Become `anychip ARGUMENTS` in new namespaces; does not return."""
    os.environ[_INSIDE] = "1"
    os.execvp(_UNSHARE[0], [*_UNSHARE, sys.executable, "-m", "anychip", *arguments])


class Networks:
    """One for each host; host n has the address 10.77.0.(n + 1) on `interface`. Only inside the namespaces."""

    interface = "fabric0"

    def __init__(self, hosts: int) -> None:
        self.addresses = [f"10.77.0.{number + 1}" for number in range(hosts)]
        script = _FABRIC + "".join(_HOST.format(number=number, address=number + 1) for number in range(hosts))
        subprocess.run(["sh", "-c", script], check=True)

    def enter(self, number: int) -> list[str]:
        """The words before a command that is to run on this host."""
        return ["nsenter", f"--net=/run/netns/host{number}"]

    def cut(self, number: int, ways: str = "both") -> None:
        """Nothing comes through any more, `both` ways, or only `out` of this host or `in`to it."""
        self._change(number, ways, "replace {} lladdr 02:00:00:00:00:99 nud permanent", "down")

    def mend(self, number: int, ways: str = "both") -> None:
        self._change(number, ways, "del {}", "up")

    def _change(self, number: int, ways: str, neighbour: str, state: str) -> None:
        """Frames to an address that no card has are lost without an error, one way only."""
        here, others = self.addresses[number], [at for at in range(len(self.addresses)) if at != number]
        if ways == "both":
            _ip(number, f"link set {self.interface} {state}")
            return
        pairs = [(number, self.addresses[at]) if ways == "out" else (at, here) for at in others]
        for host, address in pairs:
            _ip(host, f"neigh {neighbour.format(address)} dev {self.interface}")


def _ip(number: int, words: str) -> None:
    subprocess.run(["ip", "-n", f"host{number}", *words.split()], check=True)
