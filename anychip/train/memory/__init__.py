"""Copies of the state in the memory of hosts: written, mirrored by other hosts, found and put together again."""

from anychip.train.memory.copies import MemoryCopies

__all__ = ["MemoryCopies"]
