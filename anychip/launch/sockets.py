"""Sockets that listen on one address, and the address of an interface."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_BACKLOG = 4096


def listen(address: str, port: int) -> socket.socket:
    """A socket that accepts connections to this address alone."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(_BACKLOG)
    return listener


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            here = ", ".join(found for _, found in socket.if_nameindex())
            raise ValueError(f"interface {name} has no IPv4 address ({error.strerror}); here are: {here}") from None
    return socket.inet_ntoa(answer[20:24])
